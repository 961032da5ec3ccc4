"""What the tests of the KL to a reference policy run on ranks."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from launch import Rank
from offload_cases import ALL
from step_cases import Overrides, Ports, keep_gradients, load, make_config, make_groups, start

from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control, Group


def without_reward(groups: list[Group]) -> list[Group]:
    """All rewards equal: every advantage of a plain method is 0."""
    return [
        dataclasses.replace(group, scores=tuple(dataclasses.replace(s, reward=1.0) for s in group.scores))
        for group in groups
    ]


def alone(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides]) -> dict[str, dict[str, Any]]:
    """Of each case one update on groups whose rewards are equal: its gradient, what it measured, and advantages by the
    global id of the token."""
    ports, found = Ports(rank), {}
    for name, overrides in cases.items():
        config = make_config(checkpoint, overrides)
        trainer = start(ports.next(), config)
        gradients = keep_gradients(trainer)
        load(trainer, config, without_reward(make_groups()))
        entropy = trainer.score().entropy
        advantages = [
            dict(zip(d.batch.global_id_T.tolist(), d.batch.advantage_T.tolist(), strict=True)) for d in trainer._loaded
        ]
        done = trainer.update(Control(False, 1.0, 1.0, entropy, 9.0))
        found[name] = {"gradient": gradients[0], "stats": done.updates[0], "advantages": advantages[0]}
        trainer.close()
    return found


def digest(trainer: TrainerRank) -> list[str]:
    """Of the bytes of everything a rank learns with."""
    offload = trainer._offload
    with offload.present("parameters", "optimizer"):
        here = [name for name in ALL if name not in offload.away]
        return [hashlib.sha256(data).hexdigest() for name in here for data in offload.contents(name)]


def cycles(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides], count: int) -> dict[str, bool]:
    """Whether `count` reference passes, one of which fails, leave policy, gradients and optimizer state, and the
    reference, as they were, after an update."""
    ports, found = Ports(rank), {}
    for name, overrides in cases.items():
        config = make_config(checkpoint, overrides)
        trainer = start(ports.next(), config)
        load(trainer, config, make_groups())
        trainer.update(Control(True, 1.5, 0.5, trainer.score().entropy, 9.0))
        assert trainer._reference is not None
        load(trainer, config, make_groups(seed=2))
        before, kept = digest(trainer), trainer._reference._values._kept_B.clone()
        for n in range(count):
            load(trainer, config, make_groups(seed=2))
            trainer.score()
            if n == 3:
                try:
                    with trainer._offload.present("parameters"), trainer._reference._values.exchanged():
                        raise KeyError(name)
                except KeyError:
                    pass
        found[name] = digest(trainer) == before and torch.equal(kept, trainer._reference._values._kept_B)
        trainer.close()
    return found
