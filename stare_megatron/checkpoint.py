"""Training checkpoints: one folder a step with the trainer's shards and the loop's state, and an atomic `latest`.

    checkpoints/step_000040/trainer/...   Megatron-Core distributed checkpoint, written by the ranks
    checkpoints/step_000040/loop.json     everything else a resumed run needs
    checkpoints/latest                    the name of the newest whole folder

A folder is written under a temporary name and renamed when complete, so a folder with its final name is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stare_megatron.algo.controller import ControllerState
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError

_PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the loop must know to go on as if it had never stopped. `trained_tokens`: action tokens of all steps."""

    step: int
    trained_tokens: int
    stream: StreamState
    controller: ControllerState


def save(root: Path, state: LoopState, write_trainer: Callable[[Path], None], keep_last: int) -> Path:
    """Write `root/step_NNNNNN`; `write_trainer(folder)` writes the ranks' part. Then prune older checkpoints.

    Returns the new folder.
    """
    final = root / f"step_{state.step:06d}"
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_trainer(partial / "trainer")
    write_atomic(partial / "loop.json", json.dumps(dataclasses.asdict(state), indent=2))
    stale = final.with_name(final.name + ".stale" + _PARTIAL)
    if final.exists():
        os.rename(final, stale)
    os.rename(partial, final)
    write_atomic(root / "latest", final.name + "\n")
    shutil.rmtree(stale, ignore_errors=True)
    for old in _complete(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint folder `run.resume` means, or None to start anew.

    Raises:
        UserError: `never` with checkpoints present, or a folder that is no complete checkpoint.
    """
    whole = _complete(root)
    if resume == "never":
        if whole:
            raise UserError(
                f"{root}: the run already has a checkpoint ({whole[-1].name}); continue it with run.resume=auto, or "
                "choose another run.name"
            )
        return None
    if resume == "auto":
        return whole[-1] if whole else None
    folder = Path(resume)
    if not (folder / "loop.json").is_file() or not (folder / "trainer").is_dir():
        raise UserError(f"run.resume = {resume!r}: not a checkpoint folder (it must hold loop.json and trainer/)")
    return folder


def read(folder: Path) -> LoopState:
    """The loop's state in a checkpoint folder.

    Raises:
        UserError: `loop.json` is missing, malformed, or of another version.
    """
    file = folder / "loop.json"
    try:
        tree = json.loads(file.read_text())
        return LoopState(
            step=int(tree["step"]),
            trained_tokens=int(tree["trained_tokens"]),
            stream=StreamState(**tree["stream"]),
            # Checkpoints from before the controller counted its steps: it observes once a step.
            controller=ControllerState(**{"steps": int(tree["step"])} | tree["controller"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the loop state of a checkpoint: {type(e).__name__}: {e}") from e


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def _complete(root: Path) -> list[Path]:
    """Whole checkpoint folders, oldest first."""
    return sorted(p for p in root.glob("step_*") if p.suffix != _PARTIAL and (p / "loop.json").is_file())
