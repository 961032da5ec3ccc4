"""Order-free sum: add numbers two at a time, in any order, showing every step.

Prompt `3 9 4 1 :`, a right response `9 + 1 = 10 4 + 10 = 14 3 + 14 = 17`. Every step uses two numbers that are still
there and puts their sum back; three steps leave one number. A prompt of four numbers has 12 x 6 x 2 = 144 right
responses (fewer distinct ones when numbers repeat), so a policy can be right and diverse at once: uniform over them is
ln(144) / 16 = 0.31 nats per token.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import ArithmeticTask, Split, TaskPrompt, WarmUp, is_number, split_of
from stare_megatron.types import Score

_HELD_OUT_ONE_IN = 5


@dataclass(frozen=True)
class OrderFreeSum(ArithmeticTask):
    """The task over `terms` numbers from 1 to `largest`. The sum must be in the vocabulary (below 100)."""

    name: str = "order_free_sum"
    terms: int = 4
    largest: int = 12

    @property
    def max_prompt_tokens(self) -> int:
        return self.terms + 2

    @property
    def max_response_tokens(self) -> int:
        return 5 * (self.terms - 1) + 1

    @property
    def warm_up(self) -> WarmUp:
        return WarmUp(max_batches=1000, batch_size=64, lr=4e-3, stop_accuracy=0.12)

    def prompts(self, split: Split, count: int, seed: int) -> list[TaskPrompt]:
        pool = [
            numbers
            for numbers in itertools.product(range(1, self.largest + 1), repeat=self.terms)
            if self.in_split(numbers, split)
        ]
        if count > len(pool):
            raise UserError(f"task {self.name}: {count} prompts asked of split {split!r}, which has {len(pool)}")
        chosen = random.Random(f"{self.name}/{split}/{seed}").sample(pool, count)
        return [
            TaskPrompt(f"{self.name}-{split}-{index:05d}", " ".join(map(str, numbers)) + " :", str(sum(numbers)))
            for index, numbers in enumerate(chosen)
        ]

    def in_split(self, numbers: tuple[int, ...], split: Split) -> bool:
        """A set of numbers is in one split whatever its order and the task's size, so that held-out sums were never
        seen."""
        key = " ".join(map(str, sorted(numbers)))
        return split_of(f"order_free_sum/{key}", _HELD_OUT_ONE_IN) == split

    def trace(self, prompt: TaskPrompt, rng: random.Random) -> str:
        left = _numbers(prompt.text)
        words: list[str] = []
        while len(left) > 1:
            a = left.pop(rng.randrange(len(left)))
            b = left.pop(rng.randrange(len(left)))
            left.append(a + b)
            words += [str(a), "+", str(b), "=", str(a + b)]
        return " ".join(words)

    def check(self, prompt_text: str, answer: str) -> None:
        words = prompt_text.removesuffix(" :").split(" ")
        if not prompt_text.endswith(" :") or len(words) < 2 or not all(map(is_number, words)):
            raise ValueError(f"want numbers and a colon such as '3 9 4 1 :', got {prompt_text!r:.60}")
        if answer != str(sum(map(int, words))):
            raise ValueError(f"the answer to {prompt_text!r:.60} is {sum(map(int, words))}, not {answer!r:.60}")

    def verify(self, prompt_text: str, answer: str, response: str) -> Score:
        numbers = _numbers(prompt_text)
        words = response.split(" ")
        if len(words) != 5 * (len(numbers) - 1):
            return Score(0.0, False, f"{len(words)} words, want {5 * (len(numbers) - 1)}")
        left = Counter(numbers)
        for step in range(len(numbers) - 1):
            note = _merge(left, words[5 * step : 5 * step + 5])
            if note:
                return Score(0.0, False, f"step {step + 1}: {note}")
        if [str(n) for n in left.elements()] != [answer]:
            return Score(0.0, False, f"ends in {sorted(left.elements())}, want {answer}")
        return Score(1.0, True, "")


def _numbers(prompt_text: str) -> list[int]:
    return [int(word) for word in prompt_text.removesuffix(":").split()]


def _merge(left: Counter[int], words: list[str]) -> str:
    """Apply one step `a + b = c` to the numbers still there; a note on what is wrong with it, or an empty string."""
    a, plus, b, equals, c = words
    if plus != "+" or equals != "=" or not all(is_number(w) for w in (a, b, c)):
        return f"{' '.join(words)!r:.60} is no step"
    if int(a) + int(b) != int(c):
        return f"{' '.join(words)} is wrong"
    for term in (int(a), int(b)):
        if not left[term]:
            return f"{term} is not there"
        left[term] -= 1
    left[int(c)] += 1
    return ""


TASK = OrderFreeSum()
# The same with terms twice as large: a policy that learned TASK has never seen such numbers.
LARGE = OrderFreeSum(name="order_free_sum_large", largest=24)
