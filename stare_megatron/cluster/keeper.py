"""Engines as actors: asked how they are every few seconds, ended when they are lost, and started again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from stare_megatron.cluster import families, runtime
from stare_megatron.cluster.fleet import UP, Change, Fleet, State
from stare_megatron.cluster.placement import Slot
from stare_megatron.config import Config
from stare_megatron.errors import EngineLostError, RunError, UserError
from stare_megatron.types.report import RunEvent

_PERIOD_S = 5.0
_END_S = 20.0
_NO_FAMILY = families.Family("", ())


@dataclass
class _Pulse:
    """A question how an engine is. `silence`: seconds for which it has been without a good answer, as far as the driver
    was there to hear one: a driver that was busy, or stopped with everything else, blames nobody for that time."""

    ref: ray.ObjectRef
    asked: float
    answered: bool = False
    trouble: str = ""
    silence: float = 0.0


class Keeper:
    """Keeps a run's engines.

    Args:
        make: starts the actor of the engine with that number in a slot.
        slots: one for each engine.
        tell: is told of every change of an engine's state.
        pushes: weights come from a trainer.
    """

    def __init__(
        self,
        config: Config,
        crew: runtime.Crew,
        make: Callable[[int, Slot], Any],
        slots: Sequence[Slot],
        tell: Callable[[RunEvent], None],
        *,
        pushes: bool,
    ) -> None:
        self.fleet = Fleet(config.inference, pushes)
        self.may_start = True  # not while somebody else needs the memory that an engine takes
        self.restarts = 0
        self._timeout = config.cluster.start_timeout
        self._crew = crew
        self._make = make
        self._slots = list(slots)
        self._tell = tell
        self.actors: list[Any] = [make(i, slot) for i, slot in enumerate(slots)]
        self._hello = [actor.hello.remote() for actor in self.actors]
        self._starting: list[ray.ObjectRef] = list(self._hello)  # of those that `begin` has load nothing yet
        self._begun = [0.0] * len(self.actors)
        self._families = [_NO_FAMILY] * len(self.actors)
        self._pulses: dict[int, _Pulse] = {}
        self._ending: list[ray.ObjectRef] = []
        self._ticked = time.monotonic()
        self._lock = threading.RLock()  # who samples and who trains may be two threads

    def begin(self) -> None:
        """Have the engines load the model; until now their processes were there alone."""
        self._starting = [actor.start.remote() for actor in self.actors]

    def ready(self) -> None:
        """Wait until every engine can be called. What fails so early would fail again, and ends the run."""
        self._crew.meet(self._hello, self._timeout)
        self._families = self._crew.wait(self._starting, "start", self._timeout)

    def tick(self) -> bool:
        """Look after the engines; call it every few seconds, it returns at once. Returns whether a state changed."""
        with self._lock:
            now = time.monotonic()
            passed, self._ticked = min(now - self._ticked, _PERIOD_S), now
            before = [self.fleet.state(i) for i in range(len(self.actors))]
            for i in self.fleet.due(now) if self.may_start else ():
                self._restart(i, now)
            for i in self.fleet.those(State.RESTARTING):
                self._look_at_start(i, now)
            for i in self.fleet.those(*UP):
                self._look_at_pulse(i, now, passed)
            return before != [self.fleet.state(i) for i in range(len(self.actors))]

    def require(self) -> None:
        """Raises: EngineLostError: fewer engines than the run wants are left."""
        if text := self.fleet.too_few:
            raise EngineLostError(text)

    def lost(self, engine: int, actor: Any, error: EngineLostError) -> None:
        """A call to `actor` has found that the engine is gone."""
        with self._lock:
            if self.actors[engine] is actor:
                self._lost(engine, str(error))

    def move(self, slots: Sequence[Slot]) -> None:
        """Engines that are started from now on have these slots. One that was started in another, of a lost node, may
        see a GPU that is not its own: it is ended, and started again as one that is lost."""
        with self._lock:
            before, self._slots = self._slots, list(slots)
            for i, slot in enumerate(slots):
                if slot != before[i] and self.fleet.state(i) in (State.RESTARTING, *UP):
                    self._lost(i, "its place was on a node that is lost, and is another now")

    def pushed(self, engines: Sequence[int], version: int) -> None:
        """These, and nobody else, got the weights of `version`."""
        with self._lock:
            self._say(self.fleet.pushed(engines, version, time.monotonic()))

    def ask_anew(self, engines: Sequence[int]) -> None:
        """What these answer from now on is news of them: forget what they were asked before."""
        with self._lock:
            for i in engines:
                self._pulses.pop(i, None)
            self.tick()

    def has_answered(self, engine: int) -> bool:
        """Whether it was well when last asked; engines that are not up are not asked."""
        pulse = self._pulses.get(engine)
        return pulse is not None and pulse.answered and not pulse.trouble

    def close(self) -> None:
        """Stop every engine; one that does not answer within 20 s is killed."""
        up = [self.actors[i] for i in self.fleet.those(*UP)]
        closing = [actor.close.remote() for actor in up] + self._ending
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_END_S)
        left = [families.end(self._families[i]) for i in self.fleet.those(State.SUSPECT)]
        for actor in self.actors:
            ray.kill(actor)
        if left:
            ray.wait(left, num_returns=len(left), timeout=_END_S)

    def _restart(self, engine: int, now: float) -> None:
        self._say(self.fleet.restarted(engine))
        self.restarts += 1
        actor = self.actors[engine] = self._make(engine, self._slots[engine])
        self._hello[engine], self._starting[engine] = actor.hello.remote(), actor.start.remote()
        self._begun[engine] = now

    def _look_at_start(self, engine: int, now: float) -> None:
        done, _ = ray.wait([self._starting[engine]], timeout=0)
        name = self._crew.names[engine]
        if not done:
            if now - self._begun[engine] > self._timeout:
                self._lost(engine, f"did not start within {self._timeout:.0f} s (cluster.start_timeout)")
            return
        try:
            self._crew.admit(engine, runtime.get(self._hello[engine], name), runtime.station())
            self._families[engine] = runtime.get(done[0], name)
        except (RunError, UserError) as e:
            self._lost(engine, str(e))
        except ray.exceptions.RayTaskError as e:
            self._lost(engine, runtime.cause(e))
        else:
            self._say(self.fleet.started(engine, now))

    def _look_at_pulse(self, engine: int, now: float, passed: float) -> None:
        pulse = self._pulses.get(engine)
        if pulse and (pulse.trouble or not pulse.answered):
            pulse.silence += passed
        if pulse is None or (pulse.answered and now - pulse.asked >= _PERIOD_S):
            trouble, silence = (pulse.trouble, pulse.silence) if pulse else ("", 0.0)
            pulse = self._pulses[engine] = _Pulse(self.actors[engine].pulse.remote(), now, False, trouble, silence)
        if not pulse.answered and ray.wait([pulse.ref], timeout=0)[0]:
            try:
                pulse.trouble = runtime.get(pulse.ref, self._crew.names[engine], EngineLostError)
            except RunError as e:
                return self._lost(engine, str(e))
            except ray.exceptions.RayTaskError as e:
                return self._lost(engine, runtime.cause(e))
            pulse.answered = True
            if not pulse.trouble:
                pulse.silence = 0.0
                self._say(self.fleet.answered(engine))
        if pulse.silence:
            self._say_and_end(engine, self.fleet.silent(engine, pulse.silence, now, pulse.trouble or "no answer"))
        return None

    def _lost(self, engine: int, why: str) -> None:
        why = why.removeprefix(f"{self._crew.names[engine]}: ").removeprefix(f"engine {engine}: ")
        self._say_and_end(engine, self.fleet.lost(engine, time.monotonic(), why))

    def _say_and_end(self, engine: int, changes: Sequence[Change]) -> None:
        if any(change.new is State.DEAD for change in changes):
            self._pulses.pop(engine, None)
            ray.kill(self.actors[engine])
            if self._families[engine].members:
                self._ending.append(families.end(self._families[engine]))
                self._families[engine] = _NO_FAMILY
        self._say(changes)

    def _say(self, changes: Sequence[Change]) -> None:
        for c in changes:
            self._tell(
                RunEvent(
                    f"engine {c.engine}", self._crew.nodes[c.engine], c.old.value, c.new.value, c.reason, news=c.news
                )
            )
