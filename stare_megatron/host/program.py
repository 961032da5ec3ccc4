"""How this program is called from where the user is, for the commands that it prints."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "stare-megatron"


def called() -> str:
    """`stare-megatron` where a shell finds this environment's; else its path, from the current directory if it lies
    below that; else by the interpreter. Quoted for a shell."""
    beside = Path(sys.executable).parent / NAME  # in an environment, not where its interpreter's link leads
    found = shutil.which(NAME)
    if found is not None and (not beside.exists() or os.path.samefile(found, beside)):
        return NAME
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m stare_megatron"
    below = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    return shlex.quote(str(below) if len(below.parts) > 1 else f"./{below}")
