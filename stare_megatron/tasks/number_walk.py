"""Number walk: from one number to another in a few moves, by any route.

Prompt `3 , 29 :`, a right response `+ 7 = 10 * 2 = 20 + 7 = 27 ...` that ends at the goal after at most `moves` moves;
every move is one of `+ 7`, `- 4`, `* 2` and stays between 0 and 99. Most goals can be reached by many routes, some by
one only: a policy that keeps to its favourite moves cannot reach those, so here exploration pays.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import ArithmeticTask, Split, TaskPrompt, WarmUp, is_number, split_of
from stare_megatron.types import Score

_HELD_OUT_ONE_IN = 5
_MOVES = (("+", 7), ("-", 4), ("*", 2))


@dataclass(frozen=True)
class NumberWalk(ArithmeticTask):
    """The task between numbers from 0 to `largest`, in at most `moves` moves and at least `shortest`."""

    name: str = "number_walk"
    moves: int = 6
    shortest: int = 3
    largest: int = 99

    @property
    def max_prompt_tokens(self) -> int:
        return 5

    @property
    def max_response_tokens(self) -> int:
        return 4 * self.moves + 1

    @property
    def warm_up(self) -> WarmUp:
        return WarmUp(max_batches=2000, batch_size=64, lr=3e-3, stop_accuracy=0.12)

    def prompts(self, split: Split, count: int, seed: int) -> list[TaskPrompt]:
        numbers = range(self.largest + 1)
        pool = [
            (start, goal)
            for start in numbers
            for goal in numbers
            if self.shortest <= self._distance(start, goal) <= self.moves
            and split_of(f"{self.name}/{start} {goal}", _HELD_OUT_ONE_IN) == split
        ]
        if count > len(pool):
            raise UserError(f"task {self.name}: {count} prompts asked of split {split!r}, which has {len(pool)}")
        chosen = random.Random(f"{self.name}/{split}/{seed}").sample(pool, count)
        return [
            TaskPrompt(f"{self.name}-{split}-{index:05d}", f"{start} , {goal} :", str(goal))
            for index, (start, goal) in enumerate(chosen)
        ]

    def trace(self, prompt: TaskPrompt, rng: random.Random) -> str:
        """A route drawn evenly from all that are short enough."""
        here, goal = _ends(prompt.text)
        lengths = [n for n in range(1, self.moves + 1) if _routes(here, goal, n, self.largest)]
        left = rng.choices(lengths, [_routes(here, goal, n, self.largest) for n in lengths])[0]
        words: list[str] = []
        while left:
            steps = _steps(here, self.largest)
            sign, amount, here = rng.choices(steps, [_routes(n, goal, left - 1, self.largest) for _, _, n in steps])[0]
            words += [sign, str(amount), "=", str(here)]
            left -= 1
        return " ".join(words)

    def check(self, prompt_text: str, answer: str) -> None:
        words = prompt_text.split(" ")
        if len(words) != 4 or words[1::2] != [",", ":"] or not all(map(is_number, words[::2])):
            raise ValueError(f"want a start and a goal such as '3 , 29 :', got {prompt_text!r:.60}")
        if answer != words[2]:
            raise ValueError(f"the answer to {prompt_text!r:.60} is its goal, not {answer!r:.60}")

    def verify(self, prompt_text: str, answer: str, response: str) -> Score:
        here, goal = _ends(prompt_text)
        words = response.split(" ")
        moves, rest = divmod(len(words), 4)
        if rest or not 1 <= moves <= self.moves:
            return Score(0.0, False, f"{len(words)} words are no 1 to {self.moves} moves of 4")
        here, right = _walk(here, words, self.largest)
        if right < moves:
            move = " ".join(words[4 * right : 4 * right + 4])
            return Score(0.0, False, f"move {right + 1}: {move}"[:80] + f" is none from {here}")
        if here != goal:
            return Score(0.0, False, f"ends at {here}, want {goal}")
        return Score(1.0, True, "")

    def right_next(self, prompt_text: str, words: Sequence[str]) -> frozenset[str]:
        """The words that `words` can go on with so that the goal can still be reached in time; "" among them: it is
        reached, and the response may end. Empty once it cannot."""
        here, goal = _ends(prompt_text)
        moves, within = divmod(len(words), 4)
        here, right = _walk(here, words, self.largest)
        if right < moves:
            return frozenset()
        left = self.moves - moves - 1
        alive = [
            move
            for move in _moves(here, self.largest)
            if any(_routes(int(move[3]), goal, n, self.largest) for n in range(left + 1))
        ]
        begun = tuple(words[4 * moves :])
        found = {move[within] for move in alive if move[:within] == begun}
        done = 0 < moves <= self.moves and not begun and here == goal
        return frozenset(found | {""} if done else found)

    def _distance(self, start: int, goal: int) -> int:
        """Fewest moves, more than `moves` when they do not suffice."""
        reach = (n for n in range(self.moves + 1) if _routes(start, goal, n, self.largest))
        return next(reach, self.moves + 1)


def _ends(prompt_text: str) -> tuple[int, int]:
    start, goal = prompt_text.removesuffix(" :").split(" , ")
    return int(start), int(goal)


def _steps(here: int, largest: int) -> list[tuple[str, int, int]]:
    """Moves from a number: sign, amount, where it leads."""
    after = {"+": lambda n, a: n + a, "-": lambda n, a: n - a, "*": lambda n, a: n * a}
    found = [(sign, amount, after[sign](here, amount)) for sign, amount in _MOVES]
    return [step for step in found if 0 <= step[2] <= largest]


def _moves(here: int, largest: int) -> set[tuple[str, str, str, str]]:
    """The words of each."""
    return {(sign, str(amount), "=", str(number)) for sign, amount, number in _steps(here, largest)}


def _walk(here: int, words: Sequence[str], largest: int) -> tuple[int, int]:
    """Where the whole moves of `words` lead before the first that is none, and how many these are."""
    moves = len(words) // 4
    for done in range(moves):
        if tuple(words[4 * done : 4 * done + 4]) not in _moves(here, largest):
            return here, done
        here = int(words[4 * done + 3])
    return here, moves


@functools.cache
def _routes(here: int, goal: int, moves: int, largest: int) -> int:
    """How many routes of exactly `moves` moves there are."""
    if moves == 0:
        return int(here == goal)
    return sum(_routes(number, goal, moves - 1, largest) for _, _, number in _steps(here, largest))


TASK = NumberWalk()
