"""The shell commands of the README and the docs, as a reader would type them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAMS = ("stare-megatron", "python", "pytest", "make", "pip", "torchrun")
_SHELL = {"", "sh", "bash", "console"}


@dataclass(frozen=True)
class Command:
    """`words`: as a shell splits them, without comments and redirections. `inline`: within a sentence or a table."""

    page: str
    line: int
    words: tuple[str, ...]
    inline: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """All pages for readers; the log tells what was run once."""
    found = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
        ROOT / "patches/README.md",
    ]
    return sorted(page for page in found if page != ROOT / "docs/LOG.md")


def commands() -> list[Command]:
    return [c for page in pages() for c in _of_page(page)]


def _of_page(page: Path) -> Iterator[Command]:
    name = str(page.relative_to(ROOT))
    prose: list[str] = []
    block: list[tuple[int, str]] = []
    language: str | None = None  # of the fence we are in
    lines = page.read_text().splitlines()
    for number, line in enumerate([*lines, ""], 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            language = fence[1] if language is None else None
        elif (language in _SHELL) if language is not None else line.startswith("    "):
            block.append((number, line.strip()))
            prose.append("")
            continue
        yield from _of_block(name, block)
        block = []
        prose.append("" if fence or language is not None else line)
    text = "\n".join(prose)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        words = _words(" ".join(match[1].split()))
        if len(words) > 1:
            yield Command(name, text.count("\n", 0, match.start()) + 1, words, True)


def _of_block(page: str, block: list[tuple[int, str]]) -> Iterator[Command]:
    joined = ""
    for number, line in block:
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        for part in joined.split("&&"):
            words = _words(part)
            if words:
                yield Command(page, number, words, False)
        joined = ""


def _words(text: str) -> tuple[str, ...]:
    """Empty unless it is a call of one of PROGRAMS."""
    if not text.split() or text.split()[0].rpartition("/")[2] not in PROGRAMS:
        return ()
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # prose or math with an apostrophe
        return ()
    return (words[0].rpartition("/")[2], *words[1:])
