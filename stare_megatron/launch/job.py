"""A run as a job: its resolved configuration, the nodes that it takes, and the folders that it reads and writes."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron import config as configuration
from stare_megatron.cluster.bundles import nodes_needed, reserved, sandbox, sandbox_cpus
from stare_megatron.config import Config, SftConfig
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml

_CPUS_OF_A_GPU = 8  # a rank, an engine and its loading, rewards
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Nodes:
    """Equal nodes. `gpus`, `cpus`: of each; `cpus` 0: all that it has. `resource`: a Ray resource that marks them."""

    count: int
    gpus: int
    cpus: int
    resource: str = ""


@dataclass(frozen=True)
class Job:
    """What every target renders. `written`: the run; `config`: what its layout follows from; `main`: the nodes of ranks
    and engines, of which the first is the driver's; `extra`: those of the sandbox, where it has its own."""

    written: Config | SftConfig
    config: Config
    folder: Path
    main: Nodes
    extra: Nodes | None
    environment: Mapping[str, str]
    grace: int

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def command(self) -> str:
        """Of `stare-megatron`, which the job runs: `train` or `sft`."""
        return "sft" if isinstance(self.written, SftConfig) else "train"

    def entrypoint(self, settings: str) -> list[str]:
        """What a Ray job runs with the file `settings`: words of a shell's line.

        `exec`, since `ray job stop` ends the shell at once with the run: an orphan's end is seen only where the first
        process reaps it, which a container's often does not, and Ray would wait for as long as it may.
        """
        run = ["stare-megatron", self.command, settings, "cluster.address=auto", "run.resume=auto", "--quiet"]
        return ["exec", *run]

    @property
    def settings(self) -> str:
        """What a job trains with: the run's own settings and includes, resolved."""
        return to_toml(self.written)

    @property
    def groups(self) -> tuple[Nodes, ...]:
        return (self.main, self.extra) if self.extra else (self.main,)

    @property
    def run_file(self) -> Path:
        return self.folder / "job" / "run.toml"


def of(args: argparse.Namespace, overrides: Sequence[str]) -> Job:
    """The job of a command line.

    Raises:
        UserError: the run's settings are refused, or an option is.
    """
    local = args.target == "local"
    address = () if local else ("cluster.address=auto",)
    written = configuration.load_run(Path(args.settings[0]), [*args.settings[1:], *overrides, *address])
    config = written.for_ranks() if isinstance(written, SftConfig) else written
    if local and config.cluster.address != "local":
        raise UserError(
            f"cluster.address = {config.cluster.address!r}: `launch local` starts Ray on this machine; set "
            "cluster.address=local, or launch ray-job"
        )
    if config.run.resume not in ("never", "auto"):
        raise UserError(
            f"run.resume = {config.run.resume!r}: a job goes on from its own newest checkpoint whenever it starts; "
            "leave it out, or start from another one on the command line"
        )
    if min(args.gpus_per_node, args.cpus_per_node, args.nodes, args.grace) < 0 or args.sandbox_nodes < -1:
        raise UserError("--gpus-per-node, --cpus-per-node, --nodes, --sandbox-nodes and --grace are not below 0")
    folder = args.folder or config.run.dir.with_name(f"{config.run.dir.name}-launch") / config.run.name
    main, extra = _nodes(config, args)
    return Job(written, config, folder, main, extra, _environment(args.env), args.grace)


def _nodes(config: Config, args: argparse.Namespace) -> tuple[Nodes, Nodes | None]:
    """Of ranks and engines, counted from what placement will reserve, and of the sandbox."""
    own = bool(sandbox(config) and config.sandbox.node_resource and args.sandbox_nodes != 0)
    gpus, cpus = args.gpus_per_node, args.cpus_per_node
    asked = [*reserved(config, gpus=bool(gpus)), *([] if own else sandbox(config))]
    node = {"GPU": float(gpus)} if gpus else {}
    if cpus or not gpus:
        node["CPU"] = float(cpus) or math.inf
    needed = nodes_needed(asked, node)
    if args.nodes and args.nodes < needed:
        raise UserError(f"--nodes {args.nodes}: the run's layout takes {needed}; leave it out, or change the layout")
    count = args.nodes or needed
    _check_split(config, gpus if count > 1 else 0)
    if count == 1 and gpus:
        gpus = int(sum(bundle.get("GPU", 0.0) for bundle in asked))
    if not cpus and gpus < args.gpus_per_node:  # of a node that others may share
        cpus = _CPUS_OF_A_GPU * gpus + (0 if own else sandbox_cpus(config))
    if not cpus and not args.gpus_per_node:
        cpus = math.ceil(sum(bundle.get("CPU", 0.0) for bundle in asked) / count) + 1
    resource = config.sandbox.node_resource if sandbox(config) else ""
    main = Nodes(count, gpus, cpus, "" if own else resource)
    if not own:
        return main, None
    s = config.sandbox
    extra = args.sandbox_nodes if args.sandbox_nodes > 0 else s.actors
    return main, Nodes(extra, 0, math.ceil(s.actor_cpus * math.ceil(s.actors / extra)), resource)


def _check_split(config: Config, gpus: int) -> None:
    """Raises: UserError: ranks or engine GPUs that must share a node would not, over several nodes of `gpus` each."""
    shared = {"trainer.tensor_parallel": config.trainer.tensor_parallel}
    if config.inference.placement == "colocated":
        shared["inference.tensor_parallel"] = config.inference.tensor_parallel
    for key, size in shared.items():
        if gpus % size:
            raise UserError(
                f"{key} = {size} does not divide --gpus-per-node {gpus}: what splits a layer must be on one node; "
                "choose a divisor"
            )


def _environment(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, eq, value = item.partition("=")
        if not eq or not _VARIABLE.fullmatch(name):
            raise UserError(f"--env {item}: want NAME=VALUE")
        found[name] = value
    return found


def named_paths(config: Config | SftConfig) -> Iterator[tuple[str, Path]]:
    """Every folder and file that a run reads or writes, with the key that names it."""
    yield "run.dir", config.run.dir
    yield "model.path", config.model.path
    if config.model.weights:
        yield "model.weights", Path(config.model.weights)
    for path in config.data.train:
        yield "data.train", path
    if isinstance(config, SftConfig):
        for path in config.data.eval:
            yield "data.eval", path
    else:
        for benchmark in config.eval.benchmarks:
            yield "eval.benchmarks", benchmark.path
    yield from config.own_files().items()


def folders(job: Job) -> list[Path]:
    """The folders that a container must see, none within another."""
    paths = [job.folder, *(path if key in _FOLDERS else path.parent for key, path in named_paths(job.written))]
    kept: list[Path] = []
    for path in sorted(set(paths), key=lambda p: (len(p.parts), p)):
        if not any(path.is_relative_to(outer) for outer in kept):
            kept.append(path)
    return kept


_FOLDERS = {"run.dir", "model.path", "model.weights"}
