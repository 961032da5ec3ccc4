"""What supervised training needs up and running: Ray, devices, trainer ranks; as one context manager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stare_megatron import doctor
from stare_megatron.cluster import placement, runtime
from stare_megatron.cluster.lookout import Lookout
from stare_megatron.cluster.supervised import SupervisedGroup
from stare_megatron.config import Config
from stare_megatron.host.signals import undisturbed
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import sizing


class Ranks:
    """Trainer ranks that hold their parts of the model; `lookout` knows them. `make`: starts ranks and waits for
    them."""

    def __init__(self, trainers: SupervisedGroup, lookout: Lookout, make: Callable[[], SupervisedGroup]) -> None:
        self.trainers = trainers
        self.lookout = lookout
        self._make = make

    def restart(self) -> None:
        """Ranks were lost: end all of them, and start others in their place, with the weights of the beginning.

        Raises:
            LostError, RunError: some did not start.
        """
        self.trainers.close()
        self.trainers = self._make()


@contextlib.contextmanager
def open_ranks(config: Config, logs: Path, status: Callable[[str], None]) -> Iterator[Ranks]:
    """Start everything, and end it on leaving. `config`: `SftConfig.for_ranks`; `logs`: folder for the logs of all
    processes; `status`: is told what is waited for.

    Raises:
        UserError: the cluster, the model or the layout does not allow it. RunError: something did not start.
    """
    ranks = config.trainer.world_size
    config = sizing.with_time_limits(config)
    lookout = Lookout(config.watchdog, logs.parent, status)
    with undisturbed(status, "ending trainer ranks") as stack:
        status("starting Ray")
        stack.enter_context(runtime.cluster(config.cluster, placement.actors(config, ranks)))
        doctor.short(config, logs)
        places = placement.plan(config)
        stack.callback(places.release)
        shape = read_hf_config(config.model.path)
        if config.trainer.offload:
            kept = sizing.arena_bytes(config, shape) / 2**30
            status(f"trainer.offload: {kept:.2f} GiB of host memory for each of {ranks} trainer ranks")

        def start() -> SupervisedGroup:
            nonlocal places
            places = places.renewed()
            status("starting trainer ranks")
            group = SupervisedGroup(config, places.trainers, logs, lookout, shape.sequence_cost)
            stack.callback(group.close)
            group.ready()
            return group

        yield Ranks(start(), lookout, start)
