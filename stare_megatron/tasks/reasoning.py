"""Few-shot prompts of reasoning-gym's generated, verifiable tasks, and their verifier.

Upstream: github.com/open-thought/reasoning-gym.

A prompt shows solved questions of the same task and ends in an open one. The reference answer is a JSON object with the
task's name and the whole entry, which is what reasoning-gym's own scorer wants; only its full score counts as right.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Set
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.tasks.base import TaskPrompt
from stare_megatron.types import Score

STOP = "\n"
_SPARE = 4  # questions drawn for one that is wanted, at most


def prompts(
    dataset: str, settings: dict[str, Any], count: int, shots: int, seed: int, without: Set[str] = frozenset()
) -> list[TaskPrompt]:
    """`count` prompts, equal for equal arguments; other seeds give other questions.

    Small settings have few questions, and other seeds then many in common: `without` names questions, as `questions`
    gives them, that shall occur in no prompt, neither solved nor open.

    Raises:
        UserError: reasoning-gym is not installed, it has no such data set, the data set refuses its settings, or has
            too few questions besides `without`.
    """
    gym = _gym()
    if count < 1 or shots < 0:
        raise UserError(f"{dataset}: {count} prompts of {shots} shots asked")
    try:
        wanted = count * (shots + 1)
        entries = gym.create_dataset(dataset, seed=seed, size=wanted * (_SPARE if without else 1), **settings)
        allowed = list(itertools.islice((e for e in entries if _key(_line(e)) not in without), wanted))
        if len(allowed) < wanted:
            raise UserError(
                f"{dataset} with {settings}: {len(allowed)} of {wanted} questions are none of those left out"
            )
        made = []
        for index in range(count):
            block = allowed[index * (shots + 1) : (index + 1) * (shots + 1)]
            lines = [f"{_line(e)} {e['answer']}" for e in block[:-1]] + [_line(block[-1])]
            answer = json.dumps({"dataset": dataset, "entry": block[-1]}, default=str)
            made.append(TaskPrompt(f"{dataset}-{seed}-{index:05d}", "\n".join(lines), answer))
    except (ValueError, TypeError, AssertionError) as e:
        raise UserError(f"reasoning-gym data set {dataset!r} with {settings}: {e}") from e
    return made


def questions(prompt: str) -> set[str]:
    """All questions, solved and open, of a prompt that `prompts` made."""
    return {_key(line) for line in prompt.splitlines()}


def verify(answer: str, response: str) -> Score:
    """Score the first line of a response.

    Raises:
        ValueError: `answer` is no entry that `prompts` wrote.
    """
    reference = json.loads(answer)
    said = response.strip().partition("\n")[0].strip()
    score = _gym().get_score_answer_fn(reference["dataset"])(said, reference["entry"])
    right = score == 1.0
    return Score(float(right), right, "" if right else f"{said!r:.40}, want {reference['entry']['answer']!r:.40}")


def _line(entry: dict[str, Any]) -> str:
    return f"Question: {' '.join(entry['question'].split())} Answer:"


def _key(line: str) -> str:
    return line.partition(" Answer:")[0]


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as e:
        raise UserError("reasoning-gym is not installed; pip install reasoning-gym==0.1.25") from e
    return reasoning_gym
