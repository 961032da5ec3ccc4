"""Groups of numbers that no two functions of them agree on."""

from __future__ import annotations

import random
from collections.abc import Callable

from stare_megatron.types import EpisodeCounts, GroupSummary, Measured, Status


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# What rewards report, and how it is reduced.
REPORTED: dict[str, Callable[[list[float]], float]] = {
    "user/mean/x": _mean,
    "user/sum/x": sum,
    "user/max/x": max,
    "reward/part/x": _mean,
}


def random_group(rng: random.Random, i: int) -> GroupSummary:
    n = 4 + i % 3
    right = [True] * n if i in (0, 4) else [False] * n if i in (1, 3) else [rng.random() < 0.5 for _ in range(n)]
    statuses = [Status.TRUNCATED, Status.INEXACT, Status.FAILED, Status.OVERLONG, Status.COMPLETED]
    tokens = tuple(rng.randrange(2, 99 - 9 * i) for _ in range(n))
    oldest = tuple(rng.randrange(i, i + 3) for _ in range(n))
    # Some of one version, some of two, some of four.
    cuts = [min(rng.choice([1, 2, 4]), t) for t in tokens]
    runs = tuple(
        tuple((v + k, 1 if k < cut - 1 else t - cut + 1) for k in range(cut))
        for v, t, cut in zip(oldest, tokens, cuts, strict=True)
    )
    others = random.Random(i)
    return GroupSummary(
        prompt_id=str(i),
        source="s",
        rewards=tuple([0.1] * n if i == 2 else [rng.random() for _ in range(n)]),
        correct=tuple(right),
        num_tokens=(9,) * n,
        num_action_tokens=tokens,
        statuses=tuple(rng.choice(statuses) for _ in range(n)) if i != 2 else (Status.COMPLETED,) * n,
        weight_versions=oldest,
        versions=runs,
        graded=tuple(rng.random() < 0.7 for _ in range(n)),
        reflections=tuple(rng.randrange(4) for _ in range(n)),
        distinct_correct=1,
        episodes=tuple(
            EpisodeCounts(
                rng.randrange(1, 5),
                rng.randrange(3, 9),
                rng.randrange(3),
                rng.random() / (i + 1),
                rng.randrange(50),
                rng.random() < 0.5,
            )
            for _ in range(n)
        ),
        measured=tuple(
            Measured(name, (rng if name.startswith("user/") else others).random())
            for name in REPORTED
            for _ in range(n)
        ),
    )
