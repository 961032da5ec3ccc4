"""The ReTool form: code and its result within one answer.

    ...<code>\\n```python\\nprint(2 ** 70)\\n```\\n</code>
    <interpreter>\\n1180591620717411303424\\n</interpreter>\\n...

Source: ReTool, arXiv 2504.11536, section 3.2 and its templates. A fence around the code may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stare_megatron.envs.parsers.base import Encoder, Malformed, Parsed, Request, answer_within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<code>", "</code>"
TOOL = "python"
_FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n")


class ReTool:
    """See the module."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        return (CLOSE,)

    def parse(self, text: str, *, ended: bool) -> Parsed:
        before, close, trailing = text.partition(CLOSE)
        if not close:  # code that is left open cannot be answered: nothing follows an end of sequence
            return Parsed(())
        _, opened, body = before.rpartition(OPEN)
        if not opened:
            return Parsed((Malformed("", f"{CLOSE} without {OPEN}"),), trailing)
        code = _unfenced(body)
        call = Request(TOOL, code) if code.strip() else Malformed(TOOL, "there is no code in the call")
        return Parsed((call,), trailing)

    def render(self, text: str, results: Sequence[Sequence[int]], *, ended: bool) -> list[int] | None:
        return answer_within(self._encoder, text, results, "<interpreter>\n", "\n</interpreter>\n", ended=ended)


def _unfenced(body: str) -> str:
    """What stands between the fences of a call; all of it where it has none. Linear in its length."""
    opened, end = _FENCE.match(body), body.rstrip()
    if opened is None or not end.endswith("```") or len(end) - 3 < opened.end():
        return body.strip()
    return end[opened.end() : -3].rstrip(" \t").removesuffix("\n")
