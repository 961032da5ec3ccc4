"""The driver's handle on the engines: what is to be sampled goes to the least loaded one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.exceptions

from stare_megatron.cluster import runtime
from stare_megatron.cluster.dispatch import Dispatch, Limits
from stare_megatron.cluster.engine_actor import EngineActor, MakeRunner
from stare_megatron.cluster.fleet import UP, State
from stare_megatron.cluster.keeper import Keeper
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.cluster.placement import Slot
from stare_megatron.config import Config
from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.host import device
from stare_megatron.types import Begun, GroupRequest, GroupSummary, Measured
from stare_megatron.types.report import EngineReport, RunEvent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class EngineGroup:
    """All engines, and the dispatcher that the rollout collects groups through: `submit`, `results`.

    Which engine samples what: `dispatch`. `sandboxes`: actors that run code;
    `tell`: is told of every change of an engine's state, and of what an engine's loss has cost; `pushes`: weights come
    from a trainer.

    An engine that is lost costs nothing but time: what it had is sampled again, with their seeds, by others,
    and it is started again (`fleet`).
    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[Slot],
        transport: str,
        make_runner: MakeRunner,
        sandboxes: Sequence[Any],
        logs: Path,
        lookout: Lookout,
        *,
        tell: Callable[[RunEvent], None] = lambda _: None,
        pushes: bool = True,
    ) -> None:
        def make(i: int, slot: Slot) -> Any:
            options = EngineActor.options(**slot.options, runtime_env={"env_vars": slot.environment})
            return options.remote(config, i, transport, make_runner, sandboxes, logs)

        names = [f"engine {i}" for i in range(len(slots))]
        cluster = config.cluster.address != "local"
        self._tell = tell
        self._crew = runtime.Crew(names, lookout.say, named_hosts=cluster, lost=EngineLostError, lookout=lookout)
        self._keeper = Keeper(config, self._crew, make, slots, tell, pushes=pushes)
        lookout.add("engines", self._crew, self._keeper.actors)
        self._shares_gpus = device.engine_sleeps() and config.inference.placement == "colocated"
        self.renew: Callable[[Sequence[int]], None] = lambda _: None
        """Gives engines that have come back the weights that the others have, if the ranks are free and have them."""
        self.beside: Callable[[], None] = lambda: None
        """Called every second while groups are sampled: looks after who is idle meanwhile, and may raise."""
        self.asleep = False
        inference = config.inference
        in_flight = max(_SEQUENCES_IN_FLIGHT, 2 * inference.vllm.get("max_num_seqs", 0))
        limits = Limits(in_flight, inference.spread_below, inference.longest_first)
        self._dispatch = Dispatch(self._keeper, self._crew, limits)

    @property
    def actors(self) -> list[Any]:
        """Those of now; one that was started again has another."""
        return self._keeper.actors

    def prepare(self) -> None:
        """Have the engines do what can be done before `begin`; returns at once."""
        for actor in self.actors:
            actor.prepare.remote()

    def begin(self) -> None:
        """Have the engines load the model; returns at once."""
        self._keeper.begin()

    def ready(self) -> None:
        """Wait until every engine, having begun, can be called."""
        self._keeper.ready()

    def move(self, slots: Sequence[Slot]) -> None:
        """Engines that are started from now on have these."""
        self._keeper.move(slots)

    def tick(self) -> None:
        """Look after the engines; for who waits for something else."""
        self._keeper.tick()

    def check(self, engines: Collection[int]) -> None:
        """For who waits for these engines to do something together.

        Raises:
            EngineLostError: one is gone. RunError: one of its calls failed. Both name it.
        """
        self._keeper.tick()
        for i in engines:
            if self._keeper.fleet.state(i) not in UP:
                raise EngineLostError(f"{self._crew.names[i]}: {self._keeper.fleet.reason(i)}")
        asked = {self.actors[i].failure.remote(): i for i in engines}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_CHECK_S)
        for ref in done:
            if failure := runtime.get(ref, self._crew.names[asked[ref]], EngineLostError):
                raise RunError(f"{self._crew.names[asked[ref]]}: {failure}")

    def awaiting_weights(self) -> list[int]:
        """Engines that a push goes to; waits until there is one.

        Raises:
            EngineLostError: fewer engines than the run wants are left.
        """
        while True:
            self._keeper.tick()
            self._keeper.require()
            if found := self._keeper.fleet.those(State.HEALTHY, State.STALE):
                return found
            time.sleep(_GLANCE_S)

    def pushed(self, engines: Sequence[int], version: int) -> None:
        """These, and nobody else, got the weights of `version`."""
        self._keeper.pushed(engines, version)

    def any_lost(self, engines: Collection[int]) -> bool:
        """Whether one of these is gone: after something that they did together has failed. Waits for the answer of
        each."""
        self._keeper.ask_anew(sorted(engines))
        while True:
            waited = [i for i in engines if self._keeper.fleet.state(i) in UP and not self._keeper.has_answered(i)]
            if not waited:
                lost = ", ".join(self._crew.names[i] for i in engines if self._keeper.fleet.state(i) not in UP)
                if lost:
                    self._tell(RunEvent("push", "", "", "FAILED", f"{lost} lost in it", news=False))
                return bool(lost)
            time.sleep(_GLANCE_S)
            self._keeper.tick()

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Sample these too, after those that wait already."""
        self._dispatch.submit(requests)

    def results(self) -> Iterator[tuple[GroupRequest, ray.ObjectRef, GroupSummary]]:
        """Every submitted request in the order of completion, also what is submitted meanwhile.

        Raises:
            EngineLostError: fewer engines than the run wants are left.
        """
        return self._dispatch.results(self.renew, self.beside)

    def begun(self) -> dict[int, Begun]:
        """What there is of each group under way, by the seed of its request: of the engines that answer soon."""
        refs = {self.actors[i].begun.remote(): i for i in self._keeper.fleet.those(*UP)}
        found: dict[int, Begun] = {}
        for ref in ray.wait(list(refs), num_returns=len(refs), timeout=_BEGUN_S)[0] if refs else ():
            with contextlib.suppress(RunError, ray.exceptions.RayError):  # it costs what it has drawn
                for seed, part in runtime.get(ref, self._crew.names[refs[ref]], EngineLostError).items():
                    found[seed] = found.get(seed, Begun()) + part  # of a group that is spread
        return found

    def give_up(self) -> None:
        """End `results` within a second, with a GivenUpError; from another thread. `forget` before more is sampled."""
        self._dispatch.give_up()

    def forget(self) -> None:
        """`results` has ended: drop what it waited for, also from the count of groups that were sampled again."""
        self._dispatch.forget()
        self._dispatch.take_again()

    def have_weights(self) -> bool:
        """Whether some engine has the weights of the last push. One that does not answer may."""
        return bool(self._keeper.fleet.those(State.HEALTHY, State.SUSPECT))

    def logprobs(self, token_ids: npt.NDArray[np.int32]) -> dict[int, npt.NDArray[np.float32]]:
        """Each engine's log-probs of a probe prompt."""
        return self._each("logprobs", token_ids.tolist())

    def cache_gaps(self, token_ids: npt.NDArray[np.int32]) -> dict[int, float]:
        """Each engine's, see `Engine.cache_gap`."""
        return self._each("cache_gap", token_ids.tolist())

    def checksums(self, names: Collection[str] = ()) -> dict[int, dict[str, str]]:
        """Each engine's, of the parameters of these names or of all."""
        return self._each("checksums", list(names))

    def reset_prefix_cache(self) -> None:
        """Empty every engine's prefix cache."""
        self._each("reset_prefix_cache")

    def sleep(self, timeout: float = 0.0) -> None:
        """Raises: RunError: an engine failed, or did not answer within `timeout` seconds (0: no limit)."""
        if self._shares_gpus:
            self._keeper.may_start = False
            while self._keeper.fleet.those(State.RESTARTING):  # it takes memory until it can sleep
                time.sleep(_GLANCE_S)
                self._keeper.tick()
        self.asleep = True
        self._each("sleep", timeout=timeout, of=UP)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._each("wake", part, of=UP)
        if part == "kv_cache":
            self.asleep, self._keeper.may_start = False, True

    def settle(self) -> None:
        """Ranks were lost: give up what is being sampled, and engines that do not come back from what they did with
        them."""
        self._dispatch.forget()
        began = time.monotonic()
        for i in self._keeper.fleet.those(*UP):
            actor, calls = self.actors[i], 1
            while calls and self.actors[i] is actor and self._keeper.fleet.state(i) in UP:
                self._keeper.tick()
                ref = actor.calls.remote()
                if ray.wait([ref], timeout=_CHECK_S)[0]:
                    with contextlib.suppress(EngineLostError):
                        calls = runtime.get(ref, self._crew.names[i], EngineLostError)
                if calls and time.monotonic() - began > _SETTLE_S:
                    why = EngineLostError("it does not come back from a push that the trainer's ranks have left")
                    self._keeper.lost(i, actor, why)

    def report(self) -> dict[int, EngineReport]:
        """What each engine did since it was last asked, and what that took."""
        refs = {self.actors[i].report.remote(): i for i in self._keeper.fleet.those(*UP)}
        return self._gather(refs, "report", 0.0)

    def measured(self) -> tuple[Measured, ...]:
        """How the engines fared since this was last asked."""
        restarts, self._keeper.restarts = self._keeper.restarts, 0
        again = self._dispatch.take_again()
        if again:
            what = f"{again} groups, or parts of spread ones, that engines had which were lost"
            self._tell(RunEvent("sampling", "", "", "AGAIN", what, news=False))
        return (
            Measured("fleet/healthy", len(self._keeper.fleet.those(State.HEALTHY))),
            Measured("fleet/restarts", restarts),
            Measured("fleet/groups_again", again),
        )

    def close(self) -> None:
        """Stop every engine; one that does not answer within 20 s is killed."""
        self._keeper.close()

    def _each(
        self, method: str, *args: Any, timeout: float = 0.0, of: Collection[State] = (State.HEALTHY,)
    ) -> dict[int, Any]:
        """What the engines in some states return, by their numbers; one that is lost meanwhile is left out."""
        refs = {self.actors[i].call.remote(method, *args): i for i in self._keeper.fleet.those(*of)}
        return self._gather(refs, method, timeout)

    def _gather(self, refs: Mapping[ray.ObjectRef, int], what: str, timeout: float) -> dict[int, Any]:
        actors, found = list(self.actors), {}
        for ref, name in self._crew.each(refs, what, timeout, self.tick):
            try:
                found[refs[ref]] = runtime.get(ref, name, EngineLostError)
            except EngineLostError as e:
                self._keeper.lost(refs[ref], actors[refs[ref]], e)
        return dict(sorted(found.items()))


# More than an engine's scheduler runs at once (on CPUs vLLM's max_num_seqs is 256 where nobody sets it), so that it
# never starves, and few enough that a late engine can still be given less.
_SEQUENCES_IN_FLIGHT = 512
_CHECK_S = 5.0
_BEGUN_S = 10.0
_GLANCE_S = 1.0
_SETTLE_S = 30.0  # for calls of engines to notice that the ranks are gone
