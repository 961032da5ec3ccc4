"""Run stare-megatron, and kill the whole process group without a warning in a phase of a step.

    python killed_run.py PHASE STEP train CONFIG key=value ...

STEP: steps done when the phase begins; for `save` the step whose checkpoint is complete but does not have its name
yet, for `latest` the step whose checkpoint has it and is not yet in the file `latest`.
`engine` instead of a phase: kill the engine's process alone, in the rollout; `stopped-engine`: stop it (SIGSTOP).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil

# Into the phase, so that ranks and engines are at work; the shortest one takes some 0.1 s.
_DELAY_S = 0.05


def kill() -> None:
    os.killpg(0, signal.SIGKILL)


def to_engine(number: int) -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # another, that has just ended
            if "EngineActor" in " ".join(process.cmdline()):
                process.send_signal(number)


ENGINES = {
    "engine": functools.partial(to_engine, signal.SIGKILL),
    "stopped-engine": functools.partial(to_engine, signal.SIGSTOP),
}


def arm(phase: str, step: int) -> None:
    """Make the loop of this process end so."""
    from stare_megatron.checkpoint import store
    from stare_megatron.run.recorder import Recorder

    if phase == "save":
        finish = store.finish

        def finish_or_die(root: Any, number: int, known: Any) -> Any:
            if number == step:
                kill()
            return finish(root, number, known)

        store.finish = finish_or_die
        return
    if phase == "latest":
        write = store.write_atomic

        def write_or_die(path: Any, text: str) -> None:
            if (path.name, text.strip()) == (store.LATEST, store.folder_name(step)):
                kill()
            write(path, text)

        store.write_atomic = write_or_die
        return
    die = kill
    if phase in ENGINES:
        phase, die = "rollout", ENGINES[phase]
    enter, updates = Recorder.phase, [0]

    @contextlib.contextmanager
    def enter_and_die(run: Recorder[Any], name: str) -> Iterator[None]:
        # Whoever samples ahead waits for it twice a step: the first time counts.
        if name == phase and updates[0] == step + (phase == "push"):
            threading.Timer(_DELAY_S, die).start()
        updates[0] += name == "update"
        with enter(run, name):
            yield

    Recorder.phase = enter_and_die


if __name__ == "__main__":
    from stare_megatron.__main__ import main

    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
