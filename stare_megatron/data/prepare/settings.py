"""What a user may choose about a preparation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Settings:
    """`form`: prompts as text or as chat messages; `instruction`: a line after the problem, empty for none; `system`:
    a system message (chat only); `source`: the rows' source, empty for the data set's name.

    `against`: prompt files whose problems are kept out, by equality and by an `overlap` (0 to 1) of word `ngram`s, of
    which those of `common` or more problems do not count. `conflicts`: of a problem with several answers drop all rows
    or keep the first.
    """

    form: Literal["text", "chat"]
    instruction: str
    system: str
    source: str
    against: tuple[Path, ...]
    ngram: int
    overlap: float
    common: int
    conflicts: Literal["drop", "first"]
    skip_malformed: bool
