"""Shell scripts as shellcheck reads them, which comes with the extra `dev`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = Path(sys.executable).parent / "shellcheck"


def complaints(script: Path) -> str:
    """What shellcheck says of the script, read as bash; empty for nothing."""
    command = [str(_PROGRAM), "--shell=bash", str(script)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout
