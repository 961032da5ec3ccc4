"""What a generated task is: prompts, worked answers to warm a model up on, and a strict verifier.

A new task is one file with an object of this shape, and its line in `stare_megatron.tasks.TASKS`; it is then a reward,
a source of prompts and something `tools/make_tiny_model.py` can warm a model up on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from tokenize import TokenError
from typing import Literal, Protocol

from stare_megatron.types import Score

Split = Literal["train", "eval", "test"]  # settings are chosen by looking at eval; test is for what is reported

# What code of others raises on text it did not expect: it promises nothing.
UPSTREAM_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, NameError),
    *(OSError, RuntimeError, StopIteration, SyntaxError, SystemExit, TypeError, ValueError, TokenError),
)

# Ids 12 + n are the number n: a checkpoint's ids can be read by eye. Order is part of every warmed-up checkpoint.
SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>")
ARITHMETIC_WORDS = ("+", ":", "=", "-", "*", "(", ")", ",", *(str(n) for n in range(100)))


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt as text, and the reference answer its verifier wants.

    Example:
        TaskPrompt(id="order_free_sum-train-00017", text="3 9 4 1 :", answer="17")
    """

    id: str
    text: str
    answer: str


@dataclass(frozen=True)
class WarmUp:
    """Supervised warm-up of a tiny model: batches of `batch_size` worked answers, AdamW at constant `lr`.

    It stops, deliberately early, once the model's sampled accuracy on training prompts reaches `stop_accuracy`, and
    is given up after `max_batches`.
    """

    max_batches: int
    batch_size: int
    lr: float
    stop_accuracy: float


@dataclass(frozen=True)
class Tool:
    """A tool that the answers of a task may call, as far as a warm-up needs it; training calls the real one.

    A call ends in the word `call_end`; `answer(call)` is then the text that the environment puts after it, byte for
    byte what `[env]` with that parser gives for a call of the kind that `trace` makes.
    """

    call_end: str
    answer: Callable[[str], str]


class Task(Protocol):
    """A generated task over a word-level vocabulary."""

    @property
    def name(self) -> str: ...

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary after `SPECIAL_WORDS`, in id order."""
        ...

    @property
    def spaced(self) -> bool:
        """Whether words are separated by one space; else they follow each other, and the longest that fits is read."""
        ...

    @property
    def tool(self) -> Tool | None:
        """What a response may call; None: it is one turn."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, with `<bos>`."""
        ...

    @property
    def max_response_tokens(self) -> int:
        """Longest right response, with `<eos>`."""
        ...

    @property
    def warm_up(self) -> WarmUp:
        """A warm-up that leaves a tiny model able to do the task now and then."""
        ...

    def prompts(self, split: Split, count: int, seed: int) -> list[TaskPrompt]:
        """`count` distinct prompts of a split, equal for equal arguments.

        Raises:
            UserError: the split has fewer prompts than that.
        """
        ...

    def trace(self, prompt: TaskPrompt, rng: random.Random) -> str:
        """A right response drawn at random, without `<eos>` and without what a tool answers to its calls."""
        ...

    def check(self, prompt_text: str, answer: str) -> None:
        """Raises: ValueError: no prompt of this task, or not its answer; says what one looks like."""
        ...

    def verify(self, prompt_text: str, answer: str, response: str) -> Score:
        """Score a response that ended by itself, whatever it is, to a prompt that `check` takes; `response` is what the
        policy wrote, without its final `<eos>`."""
        ...


def parts_of(task: Task, trace: str) -> list[tuple[str, str]]:
    """A response as pairs: what the policy writes, and what the tool answers to it ("" after the last)."""
    if task.tool is None:
        return [(trace, "")]
    *calls, last = trace.split(task.tool.call_end)
    called = [call + task.tool.call_end for call in calls]
    return [*((call, task.tool.answer(call)) for call in called), (last, "")]


class ArithmeticTask:
    """What tasks over small numbers have in common: their words, written with spaces, and no tool."""

    @property
    def words(self) -> tuple[str, ...]:
        return ARITHMETIC_WORDS

    @property
    def spaced(self) -> bool:
        return True

    @property
    def tool(self) -> Tool | None:
        return None


def is_number(word: str) -> bool:
    """A small number as the vocabulary writes it: no sign, no leading zero, ASCII digits."""
    return len(word) <= 9 and word.isascii() and word.isdigit() and (word == "0" or word[0] != "0")


def split_of(key: str, held_out_one_in: int) -> Split:
    """The split of an instance, by a stable hash of `key`: one in `held_out_one_in` is held out, half of those each for
    `eval` and `test`."""
    digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    if digest % held_out_one_in:
        return "train"
    return "test" if digest // held_out_one_in % 2 else "eval"
