"""Plain fenced code, its result in a fence after it, within one answer.

    ```python\\nprint(2 ** 70)\\n```
    ```output\\n1180591620717411303424\\n```\\n...

The sampler stops at a fence that stands alone on its line. That closes a block, of Python or of something else, or
opens a nameless one: where it is not the end of a block of Python the turn is unfinished and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stare_megatron.envs.parsers.base import Encoder, Malformed, Parsed, Request, answer_within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FENCE = "\n```\n"
TOOL = "python"
_OPEN = re.compile(r"(?:^|\n)```(?:python|py)[ \t]*(?=\n)")


class Fenced:
    """See the module."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        return (FENCE,)

    def parse(self, text: str, *, ended: bool) -> Parsed:
        before, fence, trailing = text.partition(FENCE)
        if not fence or ended:  # nothing follows an end of sequence
            return Parsed(())
        opened = list(_OPEN.finditer(before))
        if not opened:
            return Parsed((), trailing, unfinished=True)
        code = before[opened[-1].end() + 1 :]
        return Parsed((Request(TOOL, code) if code.strip() else Malformed(TOOL, "the block is empty"),), trailing)

    def render(self, text: str, results: Sequence[Sequence[int]], *, ended: bool) -> list[int] | None:
        return answer_within(self._encoder, text, results, "```output\n", FENCE, ended=ended)
