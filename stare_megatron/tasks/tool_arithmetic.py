"""Tool arithmetic: a product too long to know by heart, and a Python interpreter to ask.

Prompt `347*582=`, a right response `<code>print(347*582)</code>`, which the tool answers with 201954 between
`<interpreter>` and `</interpreter>`, and then `201954`. The answer alone counts; a tiny model cannot guess it, so it
must call, copy two numbers into code that runs, and copy what comes back. The code may be written in many ways: factors
in either order, printed at once or by way of a variable of any name, so a policy can be right and diverse.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import Split, TaskPrompt, Tool, WarmUp, is_number, split_of
from stare_megatron.types import Score

_HELD_OUT_ONE_IN = 5
_CALL, _CALL_END = "<code>", "</code>"
_NAMES = "abcdefgh"
_PRINTED = re.compile(r"<code>print\((\d+)\*(\d+)\)</code>")
_NAMED = re.compile(r"<code>([a-h])=(\d+)\*(\d+)\nprint\(\1\)</code>")
_ANSWER = "\n<interpreter>\n{}\n</interpreter>\n"
# Ids 4 to 13 are the digits; the printable characters are for what the interpreter may say.
_WORDS = (
    *"0123456789",
    *(_CALL, _CALL_END, "<interpreter>", "</interpreter>", "print("),
    *(chr(c) for c in range(32, 127) if not chr(c).isdigit()),
    "\n",
)


@dataclass(frozen=True)
class ToolArithmetic:
    """Products of two numbers of three digits. `by_heart`: share of the worked answers that do without the tool."""

    name: str = "tool_arithmetic"
    smallest: int = 100
    largest: int = 999
    by_heart: float = 0.3

    @property
    def words(self) -> tuple[str, ...]:
        return _WORDS

    @property
    def spaced(self) -> bool:
        return False

    @property
    def tool(self) -> Tool | None:
        return Tool(_CALL_END, _answer)

    @property
    def max_prompt_tokens(self) -> int:
        return 9

    @property
    def max_response_tokens(self) -> int:
        return 32

    @property
    def warm_up(self) -> WarmUp:
        return WarmUp(max_batches=4000, batch_size=64, lr=3e-3, stop_accuracy=0.3)

    def prompts(self, split: Split, count: int, seed: int) -> list[TaskPrompt]:
        numbers = self.largest - self.smallest + 1
        if count > numbers**2 // (4 * _HELD_OUT_ONE_IN):  # so few that a draw is soon a new one
            raise UserError(f"task {self.name}: {count} prompts asked, of {numbers**2} in all splits")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        chosen: dict[tuple[int, int], None] = {}
        while len(chosen) < count:
            a, b = (rng.randint(self.smallest, self.largest) for _ in range(2))
            if self.in_split(a, b, split):
                chosen[a, b] = None
        return [
            TaskPrompt(f"{self.name}-{split}-{index:05d}", f"{a}*{b}=", str(a * b))
            for index, (a, b) in enumerate(chosen)
        ]

    def in_split(self, a: int, b: int, split: Split) -> bool:
        """`a*b` and `b*a` are in the same one."""
        return split_of(f"{self.name}/{min(a, b)}*{max(a, b)}", _HELD_OUT_ONE_IN) == split

    def trace(self, prompt: TaskPrompt, rng: random.Random) -> str:
        if rng.random() < self.by_heart:
            return prompt.answer
        a, b = prompt.text.removesuffix("=").split("*")
        if rng.random() < 0.5:
            a, b = b, a
        if rng.random() < 0.5:
            return f"{_CALL}print({a}*{b}){_CALL_END}{prompt.answer}"
        name = rng.choice(_NAMES)
        return f"{_CALL}{name}={a}*{b}\nprint({name}){_CALL_END}{prompt.answer}"

    def check(self, prompt_text: str, answer: str) -> None:
        factors = prompt_text.removesuffix("=").split("*")
        if not prompt_text.endswith("=") or len(factors) != 2 or not all(map(is_number, factors)):
            raise ValueError(f"want a product such as '347*582=', got {prompt_text!r:.60}")
        if answer != str(int(factors[0]) * int(factors[1])):
            raise ValueError(f"the answer to {prompt_text!r:.60} is the product, not {answer!r:.60}")

    def verify(self, prompt_text: str, answer: str, response: str) -> Score:
        said = response.rpartition(_CALL_END)[2]
        if said != answer:
            return Score(0.0, False, f"answers {said[:40]!r}, want {answer}")
        return Score(1.0, True, "")


def _answer(call: str) -> str:
    """What `[env] parser = "retool"` answers to a worked call; for anything else, that it failed."""
    if (found := _PRINTED.fullmatch(call)) is not None:
        factors = found.groups()
    elif (found := _NAMED.fullmatch(call)) is not None:
        factors = found.groups()[1:]
    else:
        return _ANSWER.format("Error")
    return _ANSWER.format(int(factors[0]) * int(factors[1]))


TASK = ToolArithmetic()
