"""The id of a run's wandb run, kept in `wandb/run_id` so that a resumed run continues it. Without wandb."""

from __future__ import annotations

import secrets
from pathlib import Path

from stare_megatron.host.files import write_atomic

_FILE = Path("wandb") / "run_id"


def read(run: Path) -> str:
    """The id of the run in that folder; "" before there is one."""
    file = run / _FILE
    return file.read_text().strip() if file.exists() else ""


def keep(run: Path, wandb_run: str) -> None:
    """Note an id, unless there is one already or it is ""."""
    file = run / _FILE
    if not wandb_run or file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, wandb_run)


def new() -> str:
    return secrets.token_hex(4)
