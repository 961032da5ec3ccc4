"""`stare-megatron doctor`: one table of nodes, one line a problem."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from stare_megatron import config as configuration
from stare_megatron.config import ClusterConfig, Config, SftConfig
from stare_megatron.doctor import checks, machine, survey
from stare_megatron.doctor.facts import ClusterFacts
from stare_megatron.errors import UserError
from stare_megatron.host import paths
from stare_megatron.host.packages import MISSING

_GIB = 2**30
_ADDRESS = "cluster.address="


def run(settings: Sequence[str], console: Console) -> int:
    """Check, and show what was found. `settings`: a run's file and overrides, or `cluster.address=...` alone, or
    nothing. Returns the exit code: 1 where something would stop a run, else 0.

    Raises:
        UserError: the settings cannot be read.
    """
    config, cluster = _read(settings)
    facts = survey.full(config, cluster)
    problems = checks.find(facts, config)
    console.print(f"[dim]{_versions(facts)}[/dim]", highlight=False, soft_wrap=True)
    if facts.nodes:
        console.print(table(facts))
    for problem in problems:
        style, word = ("red", "problem") if problem.stops else ("yellow", "warning")
        console.print(f"{word:>8}  {problem}", style=style, markup=False, highlight=False, soft_wrap=True)
    if not problems:
        console.print("no problems")
    return int(any(problem.stops for problem in problems))


def _read(settings: Sequence[str]) -> tuple[Config | None, ClusterConfig]:
    if settings and "=" not in settings[0]:
        config = configuration.load_run(paths.given(settings[0], "file"), list(settings[1:]))
        return config.for_ranks() if isinstance(config, SftConfig) else config, config.cluster
    if unknown := [item for item in settings if not item.startswith(_ADDRESS)]:
        raise UserError(f"{unknown[0]}: without a run's file only {_ADDRESS}... can be set; name the file first")
    return None, configuration.cluster_alone(list(settings))


def _versions(facts: ClusterFacts) -> str:
    found = facts.driver.versions | {"CUDA": facts.driver.torch_cuda or MISSING}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version != MISSING)


def table(facts: ClusterFacts) -> Table:
    """One row a node."""
    columns = ("node", "address", "CPUs", "memory", "GPUs", "driver", "/dev/shm", "clock")
    shown = Table(*columns, box=None, header_style="bold")
    if facts.shared:
        shown.add_column("disk free")
    for n in facts.nodes:
        free = [f"{n.free_bytes / _GIB:,.0f} GiB"] if facts.shared else []
        shown.add_row(
            n.host,
            f"{n.address} {n.interface}",
            str(n.cpus) if facts.address == "local" else f"{n.cpus}, {n.ray.free_cpus:g} of {n.ray.cpus:g} free",
            f"{n.memory_bytes / _GIB:,.0f} GiB",
            machine.describe(n) + (f", {n.ray.free_gpus:g} free" if n.gpus else ""),
            f"{n.gpu_driver} (CUDA {n.driver_cuda})" if n.gpu_driver else "-",
            f"{n.shm_bytes / _GIB:,.1f} GiB",
            f"{n.clock:+.1f} s",
            *free,
        )
    return shown
