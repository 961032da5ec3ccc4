"""ReTool's cold-start data as published (hub: JoeYing/ReTool-SFT), as conversations whose tool output is marked.

A published row has `messages`: a user's, with the problem after `*user question:*` behind a long instruction, and an
assistant's, with `<code>` blocks and the interpreter's words between `<interpreter>` and `</interpreter>`. Supervised
training must not teach a policy to write the latter: the interpreter does, in episodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stare_megatron.data.prepare import store
from stare_megatron.data.prepare.hub import Source
from stare_megatron.data.prepare.pipeline import tell_malformed
from stare_megatron.data.prepare.read import read
from stare_megatron.data.prepare.settings import Settings
from stare_megatron.data.prepare.types import Counts, Malformed, MalformedField, RawRow, Recipe
from stare_megatron.errors import UserError

SFT = Recipe("retool-sft", "JoeYing/ReTool-SFT", ("data/*.parquet", "*.parquet", "*.jsonl"), layouts=())
QUESTION = "*user question:*"
_TOOL_OUTPUT = re.compile(r"\n?<interpreter>\n?(.*?)\n?</interpreter>\n?", re.DOTALL)
_TAGS = re.compile(r"</?(?:code|interpreter)>")
_ONCE = ("<code>", "</code>", "<interpreter>", "</interpreter>")  # the order of a call's tags
_ANSWER = re.compile(r"\s*<answer>\s*(.*?)\s*</answer>\s*\Z", re.DOTALL)


def prepare(source: Source, settings: Settings, out: Path, report: Callable[[str], None]) -> Counts:
    """Write the conversations, with `settings.system` before each. `report`: as `tell_malformed`.

    Raises:
        UserError: unreadable files, malformed rows without `settings.skip_malformed`, no rows.
    """
    found: list[dict[str, Any]] = []
    malformed: list[Malformed] = []
    for row in (row for path in source.files for row in read(path)):
        if isinstance(row, Malformed):
            malformed.append(row)
            continue
        try:
            found.append(conversation(row, settings.system))
        except MalformedField as e:
            malformed.append(Malformed(row.place, e.field, e.problem, ""))
    rows = len(found) + len(malformed)
    tell_malformed(malformed, rows, settings, report)
    if not found:
        raise UserError(f"{source.files[0]}: no conversations")
    counts = Counts(rows, len(malformed), 0, 0, 0, 0, 0, written=len(found))
    store.write(out, found, [], malformed, SFT, source, settings, counts)
    return counts


def conversation(row: RawRow, system: str) -> dict[str, Any]:
    """A row for supervised training.

    `messages`: system, user, assistant; the assistant's tool output is written as `env.parser = "retool"` writes it.
    `parts`: the assistant's message in pieces, `{"text": ..., "learn": bool}`; tool output has `learn` false.

    Raises:
        MalformedField: another form, tags that do not pair, code whose output is missing.
    """
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or len(messages) != 2:
        raise MalformedField("messages", "want two messages, a user's and an assistant's")
    question, answer = (_content(m, role) for m, role in zip(messages, ("user", "assistant"), strict=True))
    _, found, problem = question.partition(QUESTION)
    if not found or not problem.strip():
        raise MalformedField("messages", f"no problem after {QUESTION!r} in the user's message")
    parts = _parts(answer)
    text = "".join(part["text"] for part in parts)
    asked = [{"role": "system", "content": system}, {"role": "user", "content": problem.strip()}]
    return {"messages": [*asked, {"role": "assistant", "content": text}], "parts": parts}


def _content(message: Any, role: str) -> str:
    if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
        raise MalformedField("messages", f"want a message of the role {role!r} with a text")
    return message["content"]


def _parts(answer: str) -> list[dict[str, Any]]:
    tags = _TAGS.findall(answer)
    if tags != [tag for _ in range(len(tags) // len(_ONCE)) for tag in _ONCE]:
        raise MalformedField("messages", f"tags of code and interpreter that do not pair: {' '.join(tags)[:80]}")
    answer = _ANSWER.sub(r"\n\n\1", answer).strip()
    parts: list[dict[str, Any]] = []
    begin = 0
    for match in _TOOL_OUTPUT.finditer(answer):
        written = answer[begin : match.start()].rstrip()
        if not written.endswith("</code>"):  # where an episode would stop and ask
            raise MalformedField("messages", "text between a call's code and its output")
        parts.append({"text": written, "learn": True})
        parts.append(
            {"text": f"\n<interpreter>\n{match[1].strip() or '[no output]'}\n</interpreter>\n", "learn": False}
        )
        begin = match.end()
    return [*parts, {"text": answer[begin:], "learn": True}]
