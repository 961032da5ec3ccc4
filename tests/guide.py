"""The code of a page of docs/."""

from __future__ import annotations

import re

from tests.contracts.source import ROOT


def blocks(page: str) -> dict[str, list[str]]:
    """The fenced blocks of docs/PAGE.md in their order, by language."""
    found: dict[str, list[str]] = {}
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / f"docs/{page}.md").read_text(), re.M | re.S):
        found.setdefault(language, []).append(text)
    return found
