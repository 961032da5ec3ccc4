"""What the tests of tokens of several ages run on ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from launch import Rank
from step_cases import Overrides, Ports, load, make_config, make_groups, start

from stare_megatron.types import Control, Group, Measured, Span, SpanKind

VERSION, OLDEST = 7, 3


def aged(groups: list[Group]) -> list[Group]:
    """Trajectories of all ages, and some that a push went through."""

    def spans(trajectory: Any, oldest: int) -> tuple[Span, ...]:
        made = []
        for span in trajectory.spans:
            n = len(span.token_ids)
            if span.kind is SpanKind.ACTION and n:
                half = n // 2
                runs = ((oldest, n),) if oldest == VERSION or not half else ((oldest, half), (oldest + 1, n - half))
                span = dataclasses.replace(span, versions=runs)
            made.append(span)
        return tuple(made)

    found = []
    for g, group in enumerate(groups):
        trajectories = []
        for s, trajectory in enumerate(group.trajectories):
            oldest = VERSION - (g + s) % (OLDEST + 1)
            new = dataclasses.replace(trajectory, spans=spans(trajectory, oldest), weight_versions=(oldest, oldest))
            trajectories.append(new)
        found.append(dataclasses.replace(group, trajectories=tuple(trajectories)))
    return found


def learned(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides]) -> dict[str, tuple[Measured, ...]]:
    """What an update measures of each age, under each layout; the weights too, by their step's selection."""
    ports = Ports(rank)
    found = {}
    for name, overrides in cases.items():
        config = make_config(checkpoint, overrides)
        trainer = start(ports.next(), config)
        trainer._step = VERSION
        load(trainer, config, aged(make_groups()))
        reading = trainer.score()
        done = trainer.update(Control(True, 1.5, 0.5, reading.entropy, 9.0))
        selected = [part for u in done.updates for part in u.measured if part.name.startswith("stare/selected")]
        found[name] = tuple(part for part in done.scores.measured if part.name.startswith("age/")) + tuple(selected)
        trainer.close()
    return found
