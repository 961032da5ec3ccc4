"""The folder of a hang, RUN/forensics/STEP-PHASE: what every process was at when the run was given up.

verdict.txt     what hung, for how long, and who is at fault: one line each
processes.txt   every process of every machine: what it does, its state in the kernel, its memory
machines.txt    memory, load and GPUs of every machine
stacks/         of every thread: as processes told, and as they wrote them when a signal asked (children too)
flight/         of each trainer rank: the collectives it has entered, JSON
logs/           the end of each process's log
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.hangs.verdict import Verdict
from stare_megatron.hangs.witness import Witness
from stare_megatron.host.evidence import Flight, MachineState, ProcessState, ThreadStack

FOLDER = "forensics"


@dataclass(frozen=True)
class Hang:
    """`story`: what hung and for how long, one line; `driver`: its own stacks."""

    story: str
    verdict: Verdict
    witnesses: Sequence[Witness]
    machines: Sequence[MachineState]
    driver: Sequence[ThreadStack]


def place(run: Path, step: int, phase: str) -> Path:
    """A folder that is not there yet."""
    name = f"{step}-{phase.replace(' ', '-')}"
    root = run / FOLDER
    folder, count = root / name, 1
    while folder.exists():
        count += 1
        folder = root / f"{name}-{count}"
    return folder


def write(folder: Path, hang: Hang) -> None:
    """Make the folder of a hang. Raises: OSError."""
    for part in ("stacks", "flight", "logs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "verdict.txt").write_text(f"{hang.story}\n{hang.verdict.line}\n")
    (folder / "processes.txt").write_text("\n\n".join(map(_processes, hang.witnesses)) + "\n")
    (folder / "machines.txt").write_text("\n\n".join(machine.text for machine in hang.machines) + "\n")
    (folder / "stacks/driver.txt").write_text(stacks_text(hang.driver))
    for witness in hang.witnesses:
        name = witness.name.partition(" on ")[0].replace(" ", "_")
        if witness.threads:
            (folder / f"stacks/{name}.txt").write_text(stacks_text(witness.threads))
        if witness.flight:
            (folder / f"flight/{name}.json").write_text(flight_json(witness.flight))
        for process in witness.processes:
            if process.stacks:
                (folder / f"stacks/{name}.{process.pid}.txt").write_text(f"{process.name}\n\n{process.stacks}")
        if witness.tree and witness.tree.log:
            (folder / f"logs/{name}.txt").write_text(witness.tree.log)


def stacks_text(threads: Sequence[ThreadStack]) -> str:
    """As tracebacks turned round: the innermost call of each thread first."""
    parts = [f"{thread.name}\n" + "".join(f"  {frame}\n" for frame in thread.frames) for thread in threads]
    return "\n".join(parts)


def flight_json(flight: Flight) -> str:
    return json.dumps(dataclasses.asdict(flight), indent=1)


def _processes(witness: Witness) -> str:
    said = witness.activity or "at nothing" if witness.answers else witness.trouble or "no answer"
    return "\n".join([f"{witness.name}: {said}", *map(_process, witness.processes)])


def _process(process: ProcessState) -> str:
    kernel = "".join(f"\n      {line}" for line in process.kernel.splitlines())
    return (
        f"  {process.pid} (under {process.parent}) {process.name}: {process.status}, "
        f"{process.threads} threads, {process.bytes / 2**20:.0f} MiB"
        f"{f', sleeps in {process.waits_in}' if process.waits_in else ''}{kernel}"
    )
