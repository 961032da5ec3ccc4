"""The table of checks: each finds one kind of fault in what is known of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.doctor import machine, network
from stare_megatron.doctor.facts import ClusterFacts, Finding

Check = Callable[[ClusterFacts, Config | None], Iterator[Finding]]

# What stops a run or makes its checkpoints worthless, and takes no time to know: also looked for by each run.
SHORT: tuple[Check, ...] = (
    network.silent,
    network.versions,
    machine.driver_device,
    machine.host_memory,
    network.shared_folder,
    network.shared_writable,
    network.local_folder,
    network.paths_missing,
    network.paths_differ,
    network.gloo_interface,
    network.nccl_interface,
    network.loopback,
    network.ports,
)
# What stops a run.
FAULTS: tuple[Check, ...] = (
    network.no_answer,
    network.refusal,
    *SHORT,
    machine.packages,
    machine.gpu_driver,
    machine.cuda_build,
    machine.gpu_memory,
    machine.compute_mode,
    machine.transformer_engine,
    machine.enough,
    machine.tensor_parallel,
)
# What makes it slow, or may stop it later.
WARNINGS: tuple[Check, ...] = (
    network.second_ray,
    network.authentication,
    network.interface,
    network.host_name,
    network.clock,
    network.environment,
    machine.ray_gpus,
    machine.gpu_kinds,
    machine.gpu_drivers,
    machine.nvlink,
    machine.shared_memory,
    machine.locked_memory,
    machine.open_files,
    machine.temp_disk,
    machine.free_disk,
    machine.orphans,
)


@dataclass(frozen=True)
class Problem:
    """`check`: the name of the one that found it. `stops`: the run would not start, or end badly."""

    check: str
    finding: Finding
    stops: bool

    def __str__(self) -> str:
        return f"{self.finding.where}: {self.finding.what}; {self.finding.cure}"


def find(facts: ClusterFacts, config: Config | None, checks: Iterable[Check] = (*FAULTS, *WARNINGS)) -> list[Problem]:
    """All problems, those that stop a run first."""
    return [Problem(c.__name__, found, c in FAULTS) for c in checks for found in c(facts, config)]
