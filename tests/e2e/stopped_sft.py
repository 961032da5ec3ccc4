"""Run stare-megatron, and kill the whole process group, or send this process SIGTERM, in the update of a step.

    python stopped_sft.py KILL|TERM STEP sft CONFIG key=value ...

STEP: steps done when the update begins.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def arm(how: str, step: int) -> None:
    """Make the loop of this process end so."""
    from stare_megatron.sft.recorder import Recorder

    enter, updates = Recorder.phase, [0]

    @contextlib.contextmanager
    def enter_and_stop(recorder: Recorder, name: str) -> Iterator[None]:
        with enter(recorder, name):
            if name == "update" and updates[0] == step:
                if how == "KILL":
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGTERM)
            updates[0] += name == "update"
            yield

    Recorder.phase = enter_and_stop


if __name__ == "__main__":
    from stare_megatron.__main__ import main

    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
