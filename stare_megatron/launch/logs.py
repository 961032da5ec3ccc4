"""Ray's own logs, which each node keeps for itself, brought to one place."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

# Of the node; those of ranks and engines are in the run's own logs/.
_KEPT = ("raylet*", "gcs_server*", "monitor*", "dashboard*.log", "runtime_env_agent*")


def keep(temporary: Path, target: Path) -> int:
    """Copy the logs of the newest session in Ray's folder `temporary`; returns how many. A file that goes meanwhile is
    left out."""
    session, copied = temporary / "session_latest" / "logs", 0
    for file in sorted({file for pattern in _KEPT for file in session.glob(pattern)}):
        with contextlib.suppress(FileNotFoundError):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.name)
            copied += 1
    return copied
