"""Run stare-megatron, and kill or stop one of its processes in a phase of a step.

    python faulty_run.py FAULT[,FAULT...] train CONFIG key=value ...

FAULT: TARGET:SIGNAL:PHASE:STEP. TARGET: `engine_1` (the actor of engine 1), `core_1` (vLLM's process of it: it has one
then, as on GPUs), `trainer_1` (rank 1); SIGNAL: KILL or STOP; STEP: steps logged when the phase begins. Each fault
comes once.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

# Into the phase, so that ranks and engines are at work.
_DELAY_S = 0.1


class Fault(NamedTuple):
    target: str
    number: int
    phase: str
    step: int


def parsed(text: str) -> Fault:
    target, name, phase, step = text.split(":")
    return Fault(target, signal.Signals[f"SIG{name}"], phase, int(step))


def process_of(target: str, logs: Path) -> psutil.Process:
    """The process of now: one that was started again writes to the same log."""
    kind, _, number = target.partition("_")
    name = f"engine_{number}" if kind == "core" else target
    starts = re.findall(rf"^{name} on .*, process (\d+)$", (logs / f"{name}.log").read_text(), re.MULTILINE)
    actor = psutil.Process(int(starts[-1]))
    if kind != "core":
        return actor
    (core,) = (p for p in actor.children() if p.name().startswith("VLLM"))  # a worker is its child
    return core


def arm(faults: list[Fault]) -> None:
    from stare_megatron.host import device
    from stare_megatron.run.recorder import Recorder

    if any(fault.target.startswith("core") for fault in faults):
        environment = device.engine_environment
        device.engine_environment = lambda: environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    enter, done = Recorder.phase, []

    @contextlib.contextmanager
    def enter_and_fail(run: Recorder[Any], name: str) -> Iterator[None]:
        step = run._sinks._console._step  # steps logged; in the push one more is learned
        for fault in faults:
            if fault not in done and (name, step) == (fault.phase, fault.step):
                done.append(fault)
                process = process_of(fault.target, run._config.folder / "logs")
                threading.Timer(_DELAY_S, process.send_signal, [fault.number]).start()
        with enter(run, name):
            yield

    Recorder.phase = enter_and_fail


if __name__ == "__main__":
    from stare_megatron.__main__ import main

    arm([parsed(text) for text in sys.argv[1].split(",")])
    sys.exit(main(sys.argv[2:]))
