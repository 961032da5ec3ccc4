"""What is known of a cluster, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stare_megatron.cluster.nodes import Blocked


@dataclass(frozen=True)
class Ask:
    """What to look at on a node. `id`, `address`: as Ray knows it, "" for the driver; `paths`: absolute, by what a
    message calls them ("model.path = /models/x"); `model`: one of them; `shared`: a folder that the driver made, with
    `nonce` in its file `nonce`; `full`: also what takes seconds; `local`: `checkpoint.local`."""

    id: str
    address: str
    paths: dict[str, Path]
    model: Path | None
    shared: Path | None
    nonce: str
    full: bool
    local: Path | None = None


@dataclass(frozen=True)
class Gpu:
    """As its driver reports it; bytes."""

    name: str
    bytes: int
    used_bytes: int
    compute_mode: str


@dataclass(frozen=True)
class Resources:
    """Of a node in Ray's books."""

    cpus: float = 0.0
    free_cpus: float = 0.0
    gpus: float = 0.0
    free_gpus: float = 0.0
    object_store_bytes: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """A node as a process there sees it.

    versions            by package, or MISSING
    paths               of `Ask.paths`: a digest of what is there, or MISSING
    shared_error        why the shared folder is not seen, written or renamed in; "" if it is
    local_error         why nothing can be written into `checkpoint.local`; local_with: nodes that have the same folder
    transformer_engine  why it cannot be imported; "" if it can, or is not installed
    gpu_error           why `nvidia-smi`, which is there, fails
    driver_cuda         the newest CUDA that the GPU driver serves; torch_cuda: the one that torch was built for; ""
    environment         variables that matter, as Ray was started with; values of secrets are digests
    token               a digest of Ray's token, "" where there is none
    memlock, nofile     limits of a process, bytes and files; infinite where there are none
    temp_used           fraction of the disk of Ray's temporary files
    clock               seconds ahead of the driver's
    orphans             processes that an ended run has left
    """

    host: str
    address: str
    versions: dict[str, str]
    cpus: int
    memory_bytes: int
    interface: str
    interfaces: tuple[str, ...]
    resolved: str
    environment: dict[str, str]
    auth_mode: str
    token: str
    paths: dict[str, str]
    shm_bytes: int
    memlock: float
    nofile: float
    infiniband: bool
    temp_used: float
    shared_visible: bool = True
    shared_error: str = ""
    local_error: str = ""
    local_with: tuple[str, ...] = ()
    free_bytes: int = 0
    weight_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    nvlink: bool = False
    gpu_error: str = ""
    gpu_driver: str = ""
    driver_cuda: str = ""
    torch_cuda: str = ""
    transformer_engine: str = ""
    orphans: tuple[str, ...] = ()
    clock: float = 0.0
    ray: Resources = field(default_factory=Resources)

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})" if self.address else self.host


@dataclass(frozen=True)
class ClusterFacts:
    """`address`: `cluster.address`; `device`: cpu or cuda, as the driver would choose; `shared`: the shared folder;
    `no_answer`: why nothing answers at the address; `refusal`: why Ray there refuses this process; `silent`: why a node
    told nothing, by its name."""

    address: str
    device: str
    driver: NodeFacts
    nodes: tuple[NodeFacts, ...]
    shared: str = ""
    ray_address: str = ""
    no_answer: str = ""
    refusal: str = ""
    silent: dict[str, str] = field(default_factory=dict)
    blocked: tuple[Blocked, ...] = ()

    @property
    def hosts(self) -> tuple[NodeFacts, ...]:
        """The nodes on which ranks and engines may run."""
        return tuple(n for n in self.nodes if (n.ray.gpus if self.device == "cuda" else n.ray.cpus))

    @property
    def several(self) -> bool:
        return len(self.nodes) + len(self.silent) > 1


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what mends it."""

    where: str
    what: str
    cure: str
