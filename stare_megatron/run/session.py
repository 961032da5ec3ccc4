"""What a run needs up and running: Ray, devices, sandboxes, engines, trainer ranks; as one context manager."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from stare_megatron import doctor
from stare_megatron.cluster import placement, runtime
from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.cluster.sandboxes import Sandboxes
from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import Config
from stare_megatron.host import device
from stare_megatron.host.signals import undisturbed
from stare_megatron.models.families import read_hf_config
from stare_megatron.rollout.groups import Runner
from stare_megatron.run import sizing
from stare_megatron.types.report import RunEvent


def _nobody(event: RunEvent) -> None: ...


class Session:
    """Engines that can sample and, unless it was opened without, trainer ranks that are connected to them; `lookout`
    knows them all. `make_trainers`: starts ranks and waits until they are connected."""

    def __init__(
        self,
        engines: EngineGroup,
        trainers: TrainerGroup | None,
        lookout: Lookout,
        make_trainers: Callable[[], TrainerGroup],
    ) -> None:
        self.engines = engines
        self.lookout = lookout
        self._trainers = trainers
        self._make_trainers = make_trainers

    @property
    def trainers(self) -> TrainerGroup:
        """Raises:
        RuntimeError: the session was opened without ranks.
        """
        if self._trainers is None:
            raise RuntimeError("this session has no trainer ranks")
        return self._trainers

    def restart_trainers(self) -> None:
        """Ranks were lost: end all of them, and start others in their place, with the weights of the beginning. Engines
        stay; what they were sampling is given up.

        Raises:
            LostError, RunError: some did not start.
        """
        self.trainers.close()
        self.engines.settle()
        self._trainers = self._make_trainers()


@contextlib.contextmanager
def open_session(
    config: Config,
    logs: Path,
    status: Callable[[str], None],
    load: sizing.Load,
    *,
    trainers: bool = True,
    tell: Callable[[RunEvent], None] = _nobody,
) -> Iterator[Session]:
    """Start everything, at once where it does not depend on each other, and end it on leaving.

    `logs`: folder for the logs of all processes, in the folder that gets `forensics/`; `status`: is told what is waited
    for; `load`: what the engines will be asked for; `tell`: is told of every process that is lost or comes back.

    Raises:
        UserError: the cluster, the model or the layout does not allow it. RunError: something did not start.
    """
    ranks = config.trainer.world_size if trainers else 0
    colocated = config.inference.placement == "colocated"
    transport = device.weight_transport(colocated, config.sync.method)
    config = sizing.with_time_limits(config)
    # vLLM takes the memory of the whole GPU that goes while it measures its own for its own: ranks first, where they
    # share one, and engines import meanwhile. On CPUs and elsewhere all start at once.
    in_turn = trainers and colocated and device.current() is device.Device.CUDA
    lookout = Lookout(config.watchdog, logs.parent, status)
    with undisturbed(status, "ending engines and trainer ranks" if trainers else "ending engines") as stack:
        status("starting Ray")
        stack.enter_context(runtime.cluster(config.cluster, placement.actors(config, ranks)))
        doctor.short(config, logs if trainers else None)
        places = placement.plan(config, trainers=trainers)
        stack.callback(places.release)
        shape = read_hf_config(config.model.path)
        if device.current() is device.Device.CUDA:
            config = sizing.with_engine_sizes(config, shape, places.gpu_bytes, load, trainers=trainers)
            status("engines: " + ", ".join(f"{key} {value}" for key, value in config.inference.vllm.items()))
        if trainers and (config.trainer.offload or config.algorithm.kl.on):
            wish = {"trainer.offload": config.trainer.offload, "algorithm.kl": config.algorithm.kl.on}
            kept, why = sizing.arena_bytes(config, shape) / 2**30, " and ".join(key for key, on in wish.items() if on)
            status(f"{why}: {kept:.2f} GiB of host memory for each of {ranks} trainer ranks")
        sandboxes = Sandboxes(config.sandbox, logs, places.sandboxes)
        stack.callback(sandboxes.close)
        lookout.add("sandboxes", sandboxes.crew, sandboxes.actors)
        status("starting engines and trainer ranks" if trainers else "starting engines")
        runner = functools.partial(Runner, config)

        def start_ranks() -> TrainerGroup:
            group = TrainerGroup(config, places.trainers, logs, lookout, shape.sequence_cost)
            stack.callback(group.close)
            return group

        def connect(group: TrainerGroup) -> TrainerGroup:
            engines.beside = group.check
            for line in group.connect(engines, transport):
                status(line)
            return group

        def again() -> TrainerGroup:
            nonlocal places
            places = places.renewed()
            engines.move(places.engines)
            status("starting the trainer ranks again")
            group = start_ranks()
            group.ready()
            return connect(group)

        engines = EngineGroup(
            config, places.engines, transport, runner, sandboxes.actors, logs, lookout, tell=tell, pushes=trainers
        )
        stack.callback(engines.close)
        engines.prepare() if in_turn else engines.begin()
        group = start_ranks() if trainers else None
        sandboxes.ready(config.cluster.start_timeout)
        if group is not None:
            group.ready()
        if in_turn:
            engines.begin()
        engines.ready()
        yield Session(engines, group and connect(group), lookout, again)
