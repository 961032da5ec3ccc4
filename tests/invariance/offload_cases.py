"""What the offload tests run on ranks: updates, saves and cycles of a rank whose state is away when it is not used."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
from pathlib import Path
from typing import Any

from launch import Rank
from step_cases import PROBE, Overrides, Ports, load, make_config, make_groups, start

from stare_megatron.config import Config
from stare_megatron.config.trainer import StateClass
from stare_megatron.errors import RunError
from stare_megatron.host.memory import status_bytes
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control

ALL: list[StateClass] = ["gradients", "optimizer", "parameters"]
CHOICES: list[list[StateClass]] = [[], ["optimizer"], ["parameters"], ["gradients"], ALL]


def with_offload(overrides: Overrides, classes: list[StateClass]) -> Overrides:
    return overrides | {"trainer": overrides.get("trainer", {}) | {"offload": classes}}


def update(trainer: TrainerRank, config: Config, seed: int) -> Any:
    """As the loop: the devices are the rank's, an update, and they are the engines' again."""
    trainer.to_device()
    load(trainer, config, make_groups(seed=seed))
    entropy = trainer.score().entropy
    done = trainer.update(Control(True, 1.5, 0.5, entropy, 9.0))
    probe = trainer.score_tokens(PROBE).tobytes()
    trainer.to_host()
    return done, probe


def digests(trainer: TrainerRank) -> dict[str, list[str]]:
    """Of the bytes of each class but gradients, with everything brought back for it."""
    offload = trainer._offload
    with offload.present("parameters", "optimizer"):
        return {
            "parameters": [hashlib.sha256(data).hexdigest() for data in offload.contents("parameters")],
            "optimizer": [hashlib.sha256(data).hexdigest() for data in offload.contents("optimizer")],
        }


def updates(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides], count: int) -> dict[str, Any]:
    """Of each case: what `count` updates measure and leave, without and with offload."""
    ports, found = Ports(rank), {}
    for name, overrides in cases.items():
        for classes in ([], ALL):
            plain, given = dict(overrides), overrides["trainer"]
            if not classes:  # what is for the others alone
                plain["trainer"] = {key: value for key, value in given.items() if key != "offload_step_mb"}
            config = make_config(checkpoint, with_offload(plain, classes))
            trainer = start(ports.next(), config)
            assert set(trainer._offload.away) == set(classes)
            assert trainer._offload.sizes()["optimizer"] > config.trainer.offload_step_mb << 20 or not classes
            seen = [update(trainer, config, seed) for seed in range(1, count + 1)]
            assert set(trainer._offload.away) == set(classes)
            found[name, bool(classes)] = seen, digests(trainer)
            trainer.close()
    return found


def saves(rank: Rank, *, checkpoint: Path, overrides: Overrides, folder: Path) -> dict[str, Any]:
    """Saved, exported and restored from every state a rank can be in; what the next update gives, and what the files
    hold. The first is of a rank that never moves anything."""
    ports, found = Ports(rank), {}

    def go_on(config: Config, source: Path) -> Any:
        trainer = start(ports.next(), config)
        assert trainer.restore(source) == 1
        trainer.to_host()
        seen = update(trainer, config, 2), digests(trainer)
        trainer.close()
        return seen

    plain = make_config(checkpoint, overrides)
    for classes in CHOICES:
        config = make_config(checkpoint, with_offload(overrides, classes))
        trainer = start(ports.next(), config)
        update(trainer, config, 1)
        for here in (False, True):
            if here:
                trainer.to_device()
            for background in (False, True):
                out = folder / f"{'-'.join(classes)}-{here}-{background}"
                before = trainer._offload.away
                trainer.begin_save(out, 1, snapshot=background)
                trainer.finish_save()
                trainer.export_hf(out.with_suffix(".hf"))
                assert trainer._offload.away == before
                assert trainer.held_step() == 1
        trainer.close()
        found[",".join(classes)] = go_on(config, out), go_on(plain, out)
    return found


def cycles(rank: Rank, *, checkpoint: Path, overrides: Overrides, count: int) -> list[tuple[int, int]]:
    """Resident memory and the number of tensors after each of `count` cycles, after the first few."""
    import torch

    config = make_config(checkpoint, with_offload(overrides, ALL))
    trainer, heap = start(rank, config), ctypes.CDLL(None)
    found = []
    for number in range(count + 3):
        update(trainer, config, 1)
        assert all(s.nbytes() == 0 for name in ALL for s in trainer._offload.storages(name))
        gc.collect()
        heap.malloc_trim(0)  # what is free must not count: how many pages the heap keeps of it differs from run to run
        if number >= 3:
            tensors = sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
            found.append((status_bytes(os.getpid(), "RssAnon")[0], tensors))
    trainer.close()
    return found


def failures(rank: Rank, *, checkpoint: Path, overrides: Overrides) -> tuple[str, list[str], bool]:
    """An update that fails in the middle: what is said, what is away then, and whether the rank saves what it held."""
    from stare_megatron.trainer import rank as module

    config = make_config(checkpoint, with_offload(overrides, ALL))
    trainer = start(rank, config)
    before, works, said = digests(trainer), module.step, ""

    def broken(*_: Any) -> Any:
        raise RunError("spoilt")

    module.step = broken
    try:
        update(trainer, config, 1)
    except RunError as e:
        said = str(e)
    module.step = works
    away: list[str] = sorted(trainer._offload.away)
    trainer.to_host()
    same = digests(trainer) == before
    trainer.close()
    return said, away, same
