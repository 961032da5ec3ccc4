"""The loop's part of a training checkpoint, `loop.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import TypeAdapter

from stare_megatron.algo.controller import ControllerState
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic
from stare_megatron.types import GateDuty, Observed

FILE = "loop.json"


@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the loop must know to go on as if it had never stopped.

    `step`: also the version of the weights the engines get, and what seeds of samples are derived from: there is no
    other random state outside the ranks, and no group is left over between steps. `trained_tokens`: action tokens of
    all steps; `before`: what the next step's change is measured against; `duty`: of the gate so far; `wandb_run`: id of
    the wandb run, or ""; `probe_baseline`: of `run.weights`, 0 in checkpoints from before there was one.
    """

    step: int
    trained_tokens: int
    stream: StreamState
    controller: ControllerState
    before: Observed
    duty: GateDuty
    wandb_run: str
    probe_baseline: float = 0.0


def read(folder: Path) -> LoopState:
    """The loop's state in a checkpoint folder.

    Raises:
        UserError: `loop.json` is missing, malformed, or of another version.
    """
    file = folder / FILE
    try:
        tree = json.loads(file.read_text())
        state = LoopState(
            step=int(tree["step"]),
            trained_tokens=int(tree["trained_tokens"]),
            stream=StreamState(**tree["stream"]),
            controller=ControllerState.read(tree["controller"]),
            before=Observed(**tree["before"]),
            duty=GateDuty(**tree["duty"]),
            wandb_run=str(tree["wandb_run"]),
            probe_baseline=float(tree.get("probe_baseline", 0.0)),
        )
        return TypeAdapter(LoopState).validate_python(dataclasses.asdict(state))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        why = " ".join(str(e).split())
        raise UserError(f"{file}: not the loop state of a checkpoint: {type(e).__name__}: {why}") from e


def write(folder: Path, state: LoopState) -> None:
    """Write `loop.json`."""
    write_atomic(folder / FILE, json.dumps(dataclasses.asdict(state), indent=2))
