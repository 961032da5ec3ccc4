"""Few-shot sums and products of one-digit numbers, for a small pretrained language model.

A prompt shows solved problems and ends in an open one, `7 * 8 =`; the response is right if its first line is the
number (reward `exact`, `rollout.stop = ["\\n"]`). A 135M-parameter model solves about half of them at temperature 1,
and most prompts now and then: enough signal for reinforcement learning.
"""

from __future__ import annotations

import itertools
import operator
import random

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import Split, TaskPrompt, split_of

SOURCE = "arithmetic"
STOP = "\n"

_OPERATIONS = {"+": operator.add, "*": operator.mul}
_SHOTS = 4
_HELD_OUT_ONE_IN = 5

Problem = tuple[int, str, int]


def prompts(split: Split, count: int, seed: int) -> list[TaskPrompt]:
    """`count` prompts of a split: every open problem equally often, the solved ones drawn at random from the train
    split, so that no held-out problem is ever shown with its answer.

    Raises:
        UserError: `count` < 1.
    """
    if count < 1:
        raise UserError(f"task {SOURCE}: {count} prompts asked")
    rng = random.Random(f"{SOURCE}/{split}/{seed}")
    shown = problems("train")
    order = problems(split)
    rng.shuffle(order)
    made = []
    for index, problem in zip(range(count), itertools.cycle(order), strict=False):
        shots = rng.sample([p for p in shown if p != problem], _SHOTS)
        lines = [*(f"{_open(shot)} {_solve(shot)}" for shot in shots), _open(problem)]
        made.append(TaskPrompt(f"{SOURCE}-{split}-{index:05d}", "\n".join(lines), str(_solve(problem))))
    return made


def problems(split: Split) -> list[Problem]:
    """The problems of a split; `a + b` and `b + a` are in the same one."""
    every = itertools.product(range(10), _OPERATIONS, range(10))
    return [(a, op, b) for a, op, b in every if _split(a, op, b) == split]


def _split(a: int, op: str, b: int) -> Split:
    return split_of(f"{SOURCE}/{min(a, b)} {op} {max(a, b)}", _HELD_OUT_ONE_IN)


def _open(problem: Problem) -> str:
    a, op, b = problem
    return f"{a} {op} {b} ="


def _solve(problem: Problem) -> int:
    a, op, b = problem
    return _OPERATIONS[op](a, b)
