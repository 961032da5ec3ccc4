"""Trainer ranks as Ray actors, and the driver's handle on all of them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
import ray.exceptions

from stare_megatron.cluster import runtime
from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.disks import HasDisk, HaveDisks, NodeDisk
from stare_megatron.cluster.doing import Answers, ray_actor
from stare_megatron.cluster.lookout import RANKS, Lookout
from stare_megatron.cluster.placement import Slot
from stare_megatron.cluster.rank_costs import RankCosts
from stare_megatron.cluster.roll_call import RollCall
from stare_megatron.cluster.update_batch import UpdateBatch, with_groups
from stare_megatron.cluster.weights import Address, ShardedRank, ray_fan_out
from stare_megatron.config import Config
from stare_megatron.data.packing import plan_updates
from stare_megatron.errors import RanksLostError, RunError
from stare_megatron.host import device
from stare_megatron.host.manifest import FileEntry
from stare_megatron.host.ports import free_port
from stare_megatron.sync.check import added
from stare_megatron.types import Control, EntropyReading, Group, Measured, SequenceCost, StepStats, UpdateShare
from stare_megatron.types.report import Position, RankReport
from stare_megatron.types.token_record import TokenRecord, join

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stare_megatron.cluster.engines import EngineGroup


Sums = Literal["none", "share", "all"]
_ANSWER_SECONDS = 60.0  # a rank that others have left alone in a collective answers much later, or never
_RETURN_SECONDS = 60.0  # for all ranks to end what an engine's failure has ended


@ray_actor
class TrainerActor(Answers, HasDisk):
    """One rank. Megatron-Core is imported in this process and not in the driver's."""

    _sharded: ShardedRank | None = None

    def __init__(self, config: Config, rank: int, local_rank: int, logs: Path) -> None:
        runtime.enter_actor(logs, f"trainer_{rank}")
        if config.cluster.address != "local":
            runtime.use_network_of_node()
        self._config = config
        self._rank = rank
        self._local_rank = local_rank
        self._activity, self._disk = ActivityLog(), NodeDisk(rank)
        self._costs = RankCosts(config.trainer.world_size)

    def hello(self) -> runtime.Station:
        return runtime.station()

    def endpoint(self) -> tuple[str, int]:
        """An address and a port of this rank's node, for a rendezvous: `cluster.port`, or a free one."""
        return runtime.node_address(), self._config.cluster.port or free_port()

    def start(self, master_addr: str, master_port: int) -> Position:
        # Megatron-Core's timers take wandb where they find it: 0.4 CPU seconds, and two empty folders in TMPDIR.
        absent: Any = None
        sys.modules.setdefault("wandb", absent)
        from stare_megatron.trainer.supervised import SupervisedRank

        self._trainer = SupervisedRank(
            self._config,
            rank=self._rank,
            world_size=self._config.trainer.world_size,
            local_rank=self._local_rank,
            master_addr=master_addr,
            master_port=master_port,
        )
        return self._trainer.position()

    def open_weights(self) -> Address:
        """Rank 0, before `connect`, where pushes are sharded: the address at which ranks and engines meet."""
        self._sharded = ShardedRank(self._trainer, self._rank, self._config.trainer.world_size)
        return self._sharded.open()

    def connect(self, engines: dict[str, Any], transport: str, address: Address) -> list[str]:
        """Join the weight transport, or let more engines join where pushes are sharded. Rank 0 speaks to the engines;
        the others take part in the gathering. Returns what to tell of it. `address`: from `open_weights`."""
        from stare_megatron.sync.push import WeightPusher
        from stare_megatron.sync.source import ParamSpec, WeightStream

        specs = tuple(ParamSpec(*meta) for meta in self._trainer.weight_metadata())
        self._stream = WeightStream(specs, self._weights)
        workers = self._config.inference.tensor_parallel
        if transport == "sharded":
            self._sharded = self._sharded or ShardedRank(self._trainer, self._rank, self._config.trainer.world_size)
            return self._sharded.join(engines, workers, address)
        client = ray_fan_out(engines, workers)
        self._pusher = WeightPusher(transport, self._rank, self._stream, client, runtime.node_address())
        self._pusher.connect()
        return []

    def push(self, version: int, sums: Sums, engines: list[str] | None = None) -> dict[str, str]:
        """Returns this rank's shares of checksums of what was sent. `engines`: to these alone, in shards."""
        from stare_megatron.sync.check import share

        self._wanted: frozenset[str] = frozenset()
        if sums == "all":
            self._wanted = self._all_names()
        elif sums == "share":
            turn = version // self._config.sync.probe_every
            self._wanted = share(self._stream.specs, turn, on_cpu=device.current() is device.Device.CPU)
        with self._activity.during("push", f"version {version}"), self._costs.phase("push"):
            began = time.perf_counter()
            sent = self._sharded.push(version, engines) if self._sharded else self._pusher.push(version)
            self._costs.moved("push", sent, time.perf_counter() - began)
            return self._sharded.sums(self._wanted) if self._sharded else self._found

    def checksums(self) -> dict[str, str]:
        """Of each exported parameter, by its Hugging Face name; a collective, computed on rank 0. Where pushes are
        sharded: this rank's shares of those of all boxes."""
        self._wanted = self._all_names()
        if self._sharded:
            return self._sharded.sums(self._wanted)
        for _ in self._stream.tensors():
            pass
        return self._found

    def _all_names(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self._stream.specs)

    def _weights(self) -> Iterator[tuple[str, Any]]:
        """A pass over the parameters. Leaves the checksums of those that are wanted, on rank 0."""
        from stare_megatron.sync.check import checksum

        self._found: dict[str, str] = {}
        for name, tensor in self._trainer.weights():
            if self._rank == 0 and name in self._wanted:
                self._found[name] = checksum(tensor)
            yield name, tensor

    def load(self, updates: list[tuple[list[ray.ObjectRef], UpdateShare]]) -> None:
        with self._activity.during("load"):
            fetched: list[tuple[list[Group], UpdateShare]] = [(runtime.fetch(refs), share) for refs, share in updates]
            self._trainer.load(fetched)

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        """A method of the rank, by its name."""
        with self._activity.during(method), self._costs.phase(method):
            return getattr(self._trainer, method)(*args, **named)

    def report(self) -> RankReport:
        self._costs.moved("save", *self._trainer.take_saved())
        return RankReport(self._activity.take(), self._costs.peak(), self._costs.take())


class TrainerGroup(HaveDisks):
    """All trainer ranks. Every method runs on all of them and returns what rank 0 says."""

    def __init__(self, config: Config, slots: Sequence[Slot], logs: Path, lookout: Lookout, cost: SequenceCost) -> None:
        self._config, self._cost = config, cost
        names = [f"trainer rank {rank}" for rank in range(len(slots))]
        cluster = config.cluster.address != "local"
        self._crew = runtime.Crew(names, lookout.say, named_hosts=cluster, lost=RanksLostError, lookout=lookout)
        self._actors: list[Any] = [
            TrainerActor.options(**slot.options, runtime_env={"env_vars": slot.environment}).remote(
                config, rank, slot.local_rank, logs
            )
            for rank, slot in enumerate(slots)
        ]
        lookout.add(RANKS, self._crew, self._actors)
        self._timeout = config.cluster.start_timeout
        self._hello = [actor.hello.remote() for actor in self._actors]
        self._roll = RollCall(self._actors, self._crew, config.inference.answer_timeout)
        self._turn = threading.RLock()
        self._moved_on = True
        address, port = runtime.wait([self._actors[0].endpoint.remote()], names[:1], self._timeout)[0]
        self._starting = [actor.start.remote(address, port) for actor in self._actors]

    def ready(self) -> None:
        """Wait until every rank holds its part of the model."""
        self._crew.meet(self._hello, self._timeout)
        self._positions: list[Position] = self._wait(self._starting, "start", self._timeout)

    def connect(self, engines: EngineGroup, transport: str) -> list[str]:
        """Join ranks and engines for pushes. Returns lines to tell of it."""
        self._engines, self._transport = engines, transport
        self._crew.watch = engines.tick
        self._joined: dict[int, Any] = {}
        self._address: Address = "", 0
        if transport == "sharded":
            opening = [self._actors[0].open_weights.remote()]
            self._address = runtime.wait(opening, self._crew.names[:1], self._timeout)[0]
        return self.join(range(len(engines.actors)))

    def join(self, engines: Sequence[int]) -> list[str]:
        """Let engines join: where pushes are sharded those that have not yet; else these and nobody else form a group
        with the ranks, unless it is the one that there is. An engine that was started again has not joined.

        Raises:
            RunError: one did not join; names it.
        """
        actors = {i: self._engines.actors[i] for i in engines}
        chosen = {i: actor for i, actor in actors.items() if self._joined.get(i) is not actor}
        if self._transport != "sharded" and (chosen or self._joined.keys() != actors.keys()):
            chosen, self._joined = actors, {}
        if not chosen:
            return []
        named = {f"engine {i}": actor for i, actor in chosen.items()}
        refs = [actor.connect.remote(named, self._transport, self._address) for actor in self._actors]
        said = self._together(refs, "connect", self._timeout, engines)
        self._joined |= chosen
        return said[0]

    @contextlib.contextmanager
    def free(self) -> Iterator[bool]:
        """Whether the ranks have nothing to do, and still the weights that were pushed last; they are the caller's
        within. Another thread than the one that trains may ask."""
        mine = self._turn.acquire(blocking=False)
        try:
            yield mine and not self._moved_on
        finally:
            if mine:
                self._turn.release()

    def load(self, batch: UpdateBatch) -> None:
        """Give each rank its share of the update batch; tokens travel from the engines' nodes, not through here."""
        groups = batch.groups
        plans = plan_updates([summary for _, summary in groups], self._config.trainer, self._cost)
        self._first_tokens = {
            (assignment.group, sample): first
            for plan in plans
            for share in plan
            for assignment in share.assignments
            for sample, first in zip(assignment.samples, assignment.first_token, strict=True)
        }
        shares = [
            [with_groups(groups, plan[position.data_parallel_rank]) for plan in plans] for position in self._positions
        ]
        with self._turn:
            self._wait([a.load.remote(mine) for a, mine in zip(self._actors, shares, strict=True)], "load")

    def score(self) -> EntropyReading:
        return self._rank("score")[0]

    def update(self, control: Control, *, keep_tokens: bool) -> StepStats:
        """`keep_tokens`: `token_records` will be asked for."""
        self._moved_on = True
        return self._rank("update", control, keep_tokens=keep_tokens)[0]

    def token_records(self, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], TokenRecord]:
        """What the update just done knew of the tokens of trajectories named by (group, sample), the group by its place
        in what was loaded. A trajectory that was not trained on is left out."""
        first = {key: self._first_tokens[key] for key in wanted if key in self._first_tokens}
        by_rank = self._rank("token_records", frozenset(first.values()))
        return {key: join([found[token] for found in by_rank if token in found]) for key, token in first.items()}

    def push(self, version: int, engines: Sequence[int], sums: Sums = "none") -> dict[str, str]:
        """Send the weights to these engines; those that have to join before that do so. Returns checksums of `sums` of
        the parameters, by Hugging Face name, or by its boxes: none, some (see `sync.check.share`), all.

        After an error the ranks can push again, and all of these engines must join again, which they then do.

        Raises:
            RanksLostError: a rank is gone, or did not come back when an engine failed. RunError: an engine failed, or
                an answer took longer than `sync.push_timeout`. All name who.
        """
        with self._turn:
            sent = self._push(version, engines, sums)
            self._moved_on = False
            return sent

    def _push(self, version: int, engines: Sequence[int], sums: Sums) -> dict[str, str]:
        self.join(engines)
        joined, self._joined = self._joined, {i: a for i, a in self._joined.items() if i not in engines}
        names = [f"engine {i}" for i in engines]
        refs = [actor.push.remote(version, sums, names) for actor in self._actors]
        sent = self._together(refs, "push", self._config.sync.push_timeout, engines)
        self._joined = joined
        return added(sent)

    def _together(
        self, refs: Sequence[ray.ObjectRef], what: str, timeout: float, engines: Collection[int]
    ) -> list[Any]:
        """What the ranks answer to something they do together with engines; as `push`."""
        # An engine's error reaches rank 0, which NCCL may keep blocked in a broadcast that nobody receives.
        try:
            return self._wait(refs, what, timeout, lambda: self._engines.check(engines))
        except RanksLostError:
            raise
        except (RunError, ray.exceptions.RayTaskError) as e:
            late = ray.wait(list(refs), num_returns=len(refs), timeout=_RETURN_SECONDS)[1]
            if late:
                names = ", ".join(self._crew.names[refs.index(ref)] for ref in late)
                raise RanksLostError(f"{names}: no return from a {what} within {_RETURN_SECONDS:.0f} s of {e}") from e
            raise

    def check(self) -> None:
        """For who waits while the ranks have nothing to do. Raises: RanksLostError: one is gone, or silent too long."""
        self._roll.check()

    def _wait(
        self,
        refs: Sequence[ray.ObjectRef],
        what: str,
        timeout: float = 0.0,
        watch: Callable[[], None] | None = None,
    ) -> list[Any]:
        """As `Crew.wait`. When a rank is gone it is named, and not one that suffers from it."""

        def look() -> None:
            self._roll.look()
            if watch is not None:
                watch()

        with self._roll.suspended():
            try:
                return self._crew.wait(refs, what, timeout, look)
            except ray.exceptions.RayTaskError:
                self._roll.name_the_dead()
                raise

    def score_tokens(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        return self._rank("score_tokens", token_ids)[0]

    def checksums(self) -> dict[str, str]:
        return added(self._all("checksums"))

    def held_step(self) -> int | None:
        """The step whose weights all ranks have; None where an update is not done on all of them.

        Raises:
            RunError: a rank is gone, or does not answer within a minute.
        """
        with self._turn:
            refs = [actor.call.remote("held_step") for actor in self._actors]
            held = set(self._wait(refs, "held_step", _ANSWER_SECONDS))
        return held.pop() if len(held) == 1 else None

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        """Returns when the ranks may train on, with `checkpoint.asynchronous` before everything is written."""
        self._rank("begin_save", folder, step, snapshot=self._config.checkpoint.asynchronous, local=local)

    def save_written(self) -> bool:
        return all(self._rank("save_written"))

    def finish_save(self) -> dict[str, FileEntry]:
        """Wait until all is written; entries of all ranks' files, by path relative to the folder."""
        return {name: entry for entries in self._rank("finish_save") for name, entry in entries.items()}

    def restore(self, folder: Path) -> int:
        return self._rank("restore", folder)[0]

    def export_hf(self, folder: Path) -> None:
        self._rank("export_hf", folder)

    def report(self) -> list[RankReport]:
        """What each rank did since it was last asked, and what that took."""
        return self._all("report")

    def to_device(self) -> None:
        """The engines sleep: the ranks take back what the scoring pass needs."""
        self._rank("to_device")

    def to_host(self) -> None:
        """What `trainer.offload` names leaves the GPUs; returns when their memory is free.

        Raises:
            RunError: more is left there than should be.
        """
        self._rank("to_host")

    def memory(self) -> list[Measured]:
        """Each rank's state by class and place, MB, and the seconds its moves took since this was asked last."""
        return [part for rank in self._rank("memory") for part in rank]

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _all(self, method: str, *args: Any, **named: Any) -> list[Any]:
        """What every actor's own `method` returns."""
        with self._turn:
            refs = [getattr(actor, method).remote(*args, **named) for actor in self._actors]
            return self._wait(refs, args[0] if method in ("call", "disk") else method)

    def _rank(self, method: str, *args: Any, **named: Any) -> list[Any]:
        """What every `TrainerRank`'s `method` returns."""
        return self._all("call", method, *args, **named)
