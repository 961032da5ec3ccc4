"""Settings of the sandbox. A file of its own, so that its readers need no run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Section


class SandboxConfig(Section):
    require: Literal["limits", "filter", "landlock", "namespaces"] = Field(
        default="landlock",
        description="Weakest acceptable level of protection, docs/sandbox.md; the strongest available one is used, and "
        "without this one it refuses to start.",
    )
    workers: int = Field(default=2, ge=1, description="Calls that run at once; further ones wait their turn.")
    wall_seconds: float = Field(default=20.0, gt=0, description="Wall-clock limit of a call, seconds.")
    cpu_seconds: float = Field(default=10.0, gt=0, description="CPU limit of a call, seconds.")
    memory_mb: int = Field(
        default=512, ge=16, description="Address space of a call beyond the warm interpreter's, MiB."
    )
    output_bytes: int = Field(default=65536, ge=1, description="Longest stdout and stderr of a call together, bytes.")
    scratch_mb: int = Field(
        default=64, ge=1, description="Size of a call's scratch directory, and of any file in it, MiB."
    )
    scratch_files: int = Field(
        default=1024, ge=1, description="Files and directories a call may have in its scratch directory."
    )
    preload: list[str] = Field(
        default_factory=lambda: ["numpy", "sympy"], description="Modules imported once a worker, not once a call."
    )
    sessions: int = Field(default=256, ge=1, description="Kept states (one an episode) at once; opening more waits.")
    idle_seconds: float = Field(
        default=600.0, gt=0, description="A kept state that is not used for so long is ended, seconds."
    )
    url: str = Field(
        default="",
        pattern=r"^(https?://.+)?$",
        description="Address of a SandboxFusion-compatible server to run code on; empty: run it on this machine. "
        "`require` does not apply to a server.",
    )
    retries: int = Field(default=2, ge=0, description="Further attempts at a call that the server failed to answer.")
    actors: int = Field(
        default=1, ge=1, description="Ray actors that run code, each with `workers` workers, spread over the nodes."
    )
    actor_cpus: float = Field(
        default=1.0,
        ge=0,
        description="CPUs that Ray reserves for each actor on a cluster; 0: none, it may run on any node.",
    )
    node_resource: str = Field(
        default="",
        description="Ray resource that the actors' nodes must have, to keep them off others; empty: any node.",
    )
    queue_seconds: float = Field(
        default=120.0, gt=0, description="Longest wait of a call for its turn, seconds; then it is lost."
    )
    health_seconds: float = Field(
        default=30.0, gt=0, description="An actor that does not answer a health check for so long is replaced, seconds."
    )

    @model_validator(mode="after")
    def _modules(self) -> SandboxConfig:
        for name in self.preload:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"preload holds {name!r}, which is no name of a module")
        return self
