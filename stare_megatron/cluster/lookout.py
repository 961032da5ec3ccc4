"""The driver's watch over its actors: who is silent for too long, why, and the folder that says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stare_megatron.cluster import families
from stare_megatron.cluster.doing import Doing
from stare_megatron.cluster.runtime import Crew, Station, cause
from stare_megatron.cluster.watchdog import Watchdog
from stare_megatron.config.watchdog import WatchdogConfig
from stare_megatron.errors import HangError, RunError
from stare_megatron.hangs import report
from stare_megatron.hangs.verdict import Verdict, several, verdict
from stare_megatron.hangs.witness import Witness
from stare_megatron.host import processes, stacks
from stare_megatron.host.evidence import MachineState

_ANSWER_S = 20.0  # for actors to say what they are at; the first time takes longest
_LOOK_S = 60.0  # for a process to start on another node and look at its processes
_END_S = 20.0
_GRACE_S = 8.0  # Ray needs five to kill an actor that is stopped


RANKS = "trainer ranks"


@dataclass(frozen=True)
class Member:
    """An actor of the run. `rank`: of a trainer rank, else -1; `station`: None where it is not known."""

    name: str
    rank: int
    actor: Any
    station: Station | None


class Lookout:
    """Knows all actors of a run, and who may be silent for how long.

    Args:
        config: `[watchdog]`, with `first` settled.
        run: the folder that gets `forensics/`.
        say: is told what is waited for.
    """

    def __init__(self, config: WatchdogConfig, run: Path, say: Callable[[str], None]) -> None:
        self.say = say
        self.step = 0
        self._watchdog = Watchdog(config)
        self._run = run
        self._crews: dict[str, tuple[Crew, Sequence[Any]]] = {}
        self._watching = False

    def add(self, kind: str, crew: Crew, actors: Sequence[Any]) -> None:
        """Actors to know of, in the order of the crew's names, in the place of those of the same kind. `actors` is read
        when it is needed: it holds those of then."""
        self._crews[kind] = crew, actors

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hangs are looked for within; starting and ending have time limits of their own."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def during(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """A phase of the step."""
        return self._watchdog.during(phase)

    def answered(self, what: str, silence: float) -> None:
        """One of the actors that were waited for answered after so many seconds."""
        if self._watching:
            self._watchdog.answered(what, silence)

    def look(self, late: Sequence[str], what: str, silence: float) -> None:
        """Nobody has answered for so many seconds.

        Raises:
            HangError: that is too long. All there is to know is in the run's folder then, and the processes at fault
                are ended: they would not end by themselves.
        """
        if self._watching and silence >= self._watchdog.limit(what):
            raise self.hang(late, what, silence)

    def timed_out(self, late: Sequence[str], what: str, silence: float) -> RunError:
        """The same for a wait with a limit of its own."""
        if self._watching:
            return self.hang(late, what, silence)
        return RunError(f"{several(late)}: no answer within {silence:.0f} s ({what})")

    def hang(self, late: Sequence[str], what: str, silence: float) -> HangError:
        """Find out who is at fault, write down everything, end who is."""
        phase = self._watchdog.phase
        at = what if what == phase else f"{what}, {phase}"
        story = f"{several(late)}: no answer within {silence:.0f} s ({at} of step {self.step})"
        self.say(f"{story}; asking every process what it is at")
        members = list(self._members())
        answers = _ask(members)
        machines = _look(m.station for m in members if m.station)
        # One that we cannot look at from outside, a sandbox, is heard if it speaks.
        witnesses = [_witness(m, answers.get(m.name, ""), machines) for m in members if m.station or m.name in answers]
        found = verdict(_suspects(witnesses, late))
        folder = report.place(self._run, self.step, phase)
        evidence = report.Hang(story, found, witnesses, list(machines.values()), stacks.thread_stacks())
        where = f"all that is known is in {folder}"
        try:
            report.write(folder, evidence)
        except OSError as e:
            where = f"{folder} cannot be written: {e.strerror}"
        _end(members, found)
        return HangError(f"{story}: {found.line} ({where})", found.culprits)

    def _members(self) -> Iterator[Member]:
        for kind, (crew, actors) in self._crews.items():
            for i, (name, actor, station) in enumerate(zip(crew.names, actors, crew.stations, strict=True)):
                yield Member(name, i if kind == RANKS else -1, actor, station)


def _suspects(witnesses: Sequence[Witness], late: Sequence[str]) -> list[Witness]:
    """Who has not answered; all ranks if one of them has not, since they wait for each other; and who is seen to be
    stopped or to have ended, whoever waits for it."""
    ranks = any(w.rank >= 0 for w in witnesses if w.name in late)
    return [w for w in witnesses if w.name in late or (ranks and w.rank >= 0) or w.outside]


def _ask(members: Sequence[Member]) -> dict[str, Doing | str]:
    """What those that answer are at, by name, or why one could not say."""
    asked = {m.actor.doing.remote(): m.name for m in members}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    found: dict[str, Doing | str] = {}
    for ref in done:
        try:
            found[asked[ref]] = ray.get(ref)
        except ray.exceptions.RayError as e:
            found[asked[ref]] = cause(e)
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _examine(pids: list[int]) -> MachineState:
    return processes.examine(pids)


def _by_node(stations: Iterable[Station]) -> dict[str, list[int]]:
    pids: dict[str, list[int]] = {}
    for station in stations:
        pids.setdefault(station.node, []).append(station.process)
    return pids


def _look(stations: Iterable[Station]) -> dict[str, MachineState]:
    """What is seen on each node, by its id; a node that does not let us look is left out."""
    pids, own = _by_node(stations), ray.get_runtime_context().get_node_id()
    asked = {
        _examine.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(of): node
        for node, of in pids.items()
        if node != own
    }
    found = {own: processes.examine(pids.get(own, []))}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_S) if asked else ([], [])
    for ref in done:
        with contextlib.suppress(ray.exceptions.RayError):
            found[asked[ref]] = ray.get(ref)
    return found


def _end(members: Sequence[Member], found: Verdict) -> None:
    """Kill the processes at fault, with all under them: a stopped one would outlive the run on a cluster. What is under
    them goes first, while it can be found, then Ray ends the actors, and so is not surprised."""
    guilty = [m for m in members if m.station and m.name in found.culprits]
    own = ray.get_runtime_context().get_node_id()
    stations = [m.station for m in guilty if m.station]
    trees = processes.under(there.process for there in stations if there.node == own)
    elsewhere = [families.end(there.family) for there in stations if there.node != own]
    if elsewhere:
        ray.wait(elsewhere, num_returns=len(elsewhere), timeout=_END_S)
    for member in guilty:
        ray.kill(member.actor)
    processes.end(trees, _GRACE_S)


def _witness(member: Member, doing: Doing | str, machines: dict[str, MachineState]) -> Witness:
    station = member.station
    machine = machines.get(station.node) if station else None
    tree = machine.trees.get(station.process) if station and machine else None
    if isinstance(doing, str):
        return Witness(member.name, member.rank, answers=False, trouble=doing, tree=tree)
    newest = doing.activities[-1].activity if doing.activities else None
    return Witness(
        name=member.name,
        rank=member.rank,
        answers=True,
        activity=" ".join(filter(None, (newest.name, newest.detail, f"for {newest.seconds:.0f} s"))) if newest else "",
        frames=doing.working(),
        threads=doing.threads,
        flight=doing.flight,
        tree=tree,
    )
