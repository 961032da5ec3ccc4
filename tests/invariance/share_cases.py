"""What the tests of shares run on ranks: what each writes and reads, from where and at what cost of memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from launch import Rank
from saving_cases import step
from step_cases import Overrides, Ports, make_config, save, start

from stare_megatron.host.memory import status_bytes
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import UpdateStats


def upstreams(rank: Rank, *, checkpoint: Path, layout: Overrides, folder: Path) -> list[UpdateStats]:
    """A state saved here, and as Megatron-Core itself makes whole tensors of it; the next step of the trainer that was
    saved, and of those restored from both."""
    ports, config = Ports(rank), make_config(checkpoint, layout)
    trainer = start(ports.next(), config)
    step(trainer, config, 1)
    save(trainer, folder / "shares", 7)
    _save_whole(trainer, folder / "whole")
    found = [step(trainer, config, 2)]
    trainer.close()
    for name in ("shares", "whole"):
        trainer = start(ports.next(), config)
        assert trainer.restore(folder / name) == 7
        found.append(step(trainer, config, 2))
        trainer.close()
    return found


def _save_whole(trainer: TrainerRank, folder: Path) -> None:
    import contextlib

    from stare_megatron.trainer import shares

    ours = shares.in_place, shares.split
    shares.in_place = contextlib.nullcontext  # type: ignore[assignment]
    shares.split = lambda *_: {}  # type: ignore[assignment]
    kept, trainer._writer = trainer._writer, type(trainer._writer)(threads=2)
    try:
        save(trainer, folder, 7)
    finally:
        shares.in_place, shares.split = ours
        trainer._writer = kept


def between(rank: Rank, *, checkpoint: Path, layout: Overrides, source: Path | None, out: Path) -> list[UpdateStats]:
    """Restored from `source`, or one step done; saved to `out`. The next step."""
    config = make_config(checkpoint, layout)
    trainer = start(rank, config)
    if source is None:
        step(trainer, config, 1)
    else:
        assert trainer.restore(source) == 7
    save(trainer, out, 7)
    found = [step(trainer, config, 2)]
    trainer.close()
    return found


def memory(rank: Rank, *, checkpoint: Path, layout: Overrides, out: Path) -> dict[str, int]:
    """Bytes of resident memory beyond what was held before, at the most, in each of three: a save at once, one in the
    background, a restore. Each is done once before, for what a process allocates the first time and keeps."""
    config = make_config(checkpoint, layout)
    trainer = start(rank, config)
    step(trainer, config, 1)
    found: dict[str, int] = {}
    for number in range(2):
        folder = out / str(number)
        for name, act in _acts(trainer, folder).items():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            (before,) = status_bytes(os.getpid(), "VmRSS")
            act()
            (most,) = status_bytes(os.getpid(), "VmHWM")
            found[name] = most - before
    trainer.close()
    return found


def _acts(trainer: TrainerRank, folder: Path) -> dict[str, Any]:
    def in_background() -> None:
        trainer.begin_save(folder / "background", 7, snapshot=True)
        trainer.finish_save()

    return {
        "at once": lambda: save(trainer, folder / "once", 7),
        "in background": in_background,
        "restore": lambda: trainer.restore(folder / "once"),
    }
