"""A whole run's configuration, and what its tables must agree on.

Every key is a field with its meaning, unit and default. What needs more (the model's shape, files, the machine) is
checked in `run/preflight.py`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from stare_megatron.config import float8, methods
from stare_megatron.config.algorithm import AlgorithmConfig
from stare_megatron.config.base import Free, Section
from stare_megatron.config.checkpoint import CheckpointConfig
from stare_megatron.config.cluster import ClusterConfig
from stare_megatron.config.data import DataConfig
from stare_megatron.config.env import EnvConfig
from stare_megatron.config.eval import EvalConfig
from stare_megatron.config.inference import InferenceConfig
from stare_megatron.config.logging import LoggingConfig
from stare_megatron.config.model import ModelConfig
from stare_megatron.config.registry import source_file
from stare_megatron.config.reward import RewardConfig
from stare_megatron.config.rollout import RolloutConfig
from stare_megatron.config.run import RunConfig
from stare_megatron.config.sampling import SamplingConfig
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.config.sync import SyncConfig
from stare_megatron.config.trainer import TrainerConfig
from stare_megatron.config.watchdog import WatchdogConfig


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(description="The run itself.")
    model: ModelConfig = Field(description="The policy.")
    data: DataConfig = Field(description="Prompts.")
    reward: RewardConfig = Field(description="The reward.")
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description="Sampling.")
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(), description="When batches are sampled, and by which policy."
    )
    env: EnvConfig = Field(default_factory=lambda: EnvConfig(), description="What the policy acts in.")
    sandbox: Free[SandboxConfig] = Field(
        default_factory=lambda: SandboxConfig(),
        description="Where code that the policy writes is run, docs/sandbox.md; for an environment or a reward that "
        "needs it.",
    )
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig(), description="The objective.")
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig(), description="Megatron-Core ranks.")
    inference: Free[InferenceConfig] = Field(default_factory=lambda: InferenceConfig(), description="vLLM engines.")
    sync: Free[SyncConfig] = Field(default_factory=lambda: SyncConfig(), description="Weight pushes.")
    checkpoint: Free[CheckpointConfig] = Field(default_factory=lambda: CheckpointConfig(), description="What is saved.")
    logging: Free[LoggingConfig] = Field(default_factory=lambda: LoggingConfig(), description="Where metrics go.")
    eval: Free[EvalConfig] = Field(
        default_factory=lambda: EvalConfig(),
        description="Evaluation on held-out prompts.",
    )
    cluster: Free[ClusterConfig] = Field(default_factory=lambda: ClusterConfig(), description="Ray.")
    watchdog: Free[WatchdogConfig] = Field(
        default_factory=lambda: WatchdogConfig(), description="What is done about hangs."
    )

    @property
    def window(self) -> int:
        """Longest sequence, tokens."""
        return self.inference.max_model_len or self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def eval_response_tokens(self) -> int:
        """Longest response of an evaluation, tokens."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def uses_sandbox(self) -> bool:
        """Whether code that the policy writes is run."""
        return self.env.kind.needs_sandbox or self.reward.kind.runs_code(self.reward.settings)

    def own_files(self) -> dict[str, Path]:
        """The files that the user's objects come from, by the key that names them."""
        named = {"reward.name": self.reward.name, "env.name": self.env.name, "algorithm.method": self.algorithm.method}
        further = self.reward.kind.addresses_of(self.reward.settings)
        named |= {f"reward.{key}": name for key, name in further.items()}
        found = {key: source_file(name) for key, name in named.items()}
        return {key: file for key, file in found.items() if file}

    def dated(self, date: str) -> Config:
        """With `data.date` settled."""
        return self.model_copy(update={"data": self.data.model_copy(update={"date": date})})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name

    @model_validator(mode="after")
    def _cross(self) -> Config:
        need = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.window < need:
            raise ValueError(
                f"inference.max_model_len {self.window} is shorter than data.max_prompt_tokens "
                f"{self.data.max_prompt_tokens} + rollout.max_response_tokens {self.rollout.max_response_tokens} = "
                f"{need}"
            )
        if self.eval.benchmarks and self.window <= self.eval_response_tokens:
            raise ValueError(
                f"eval.max_response_tokens {self.eval.max_response_tokens} leaves no room for a prompt in the window "
                f"of {self.window} tokens; lower it or set inference.max_model_len"
            )
        session = self.env.kind.session_key
        if self.sandbox.url and session and self.env.settings.model_dump()[session]:
            raise ValueError(
                f"env.{session} = true: the server at sandbox.url = {self.sandbox.url!r} keeps no state across calls; "
                f"set env.{session} = false, or leave sandbox.url empty"
            )
        if self.sandbox.node_resource and self.cluster.address == "local":
            raise ValueError(
                f"sandbox.node_resource = {self.sandbox.node_resource!r} names nodes of a cluster, but cluster.address "
                'is "local"; leave it empty, or join a cluster'
            )
        if "parameters" in self.trainer.offload and self.inference.placement == "separate":
            raise ValueError(
                f'trainer.offload = {self.trainer.offload}: nobody wants the room of "parameters" where '
                'inference.placement = "separate"; take it out, or set inference.placement = "colocated"'
            )
        if (folder := self.checkpoint.local_overlap(self.folder)) is not None:
            raise ValueError(
                f"checkpoint.local = {self.checkpoint.local!r} and the run's folder {folder} lie in each other; name a "
                "folder on each node's own disk"
            )
        r, t = self.rollout, self.trainer
        fault = t.optimizer.fault(self.run.steps * t.updates_per_batch)
        if fault and not t.optimizer.short_warmup:
            raise ValueError(fault)
        if r.prompts_per_step % t.updates_per_batch:
            raise ValueError(
                f"rollout.prompts_per_step {r.prompts_per_step} is not a multiple of trainer.updates_per_batch "
                f"{t.updates_per_batch}"
            )
        sequences = r.prompts_per_step * r.group_size // t.updates_per_batch
        if sequences < t.data_parallel:
            raise ValueError(
                f"rollout.prompts_per_step x rollout.group_size / trainer.updates_per_batch = {sequences} sequences "
                f"cannot feed {t.data_parallel} data-parallel ranks"
            )
        a = self.algorithm
        fault = methods.correction_fault(a.correction, r.temperature, r.top_p)
        if t.scoring == "rollout":
            settings = (a.method, a.stare, t.updates_per_batch, r.temperature, r.top_p)
            fault = fault or methods.rollout_scoring_fault(*settings)
        fault = fault or t.optimizer.type_fault(self.model.dtype)
        fault = fault or self._float8_fault()
        fault = fault or (a.stare.idle() if a.method == "stare" else "")
        scope = a.stare.scope if a.method == "stare" else "batch"
        fault = fault or self.sampling.fault(self.inference.placement, a.correction.mode, t.scoring, scope)
        if fault:
            raise ValueError(fault)
        reward, env = self.reward, self.env
        wanted = (*reward.kind.columns_of(reward.settings), *env.kind.columns_of(env.settings))
        if missing := [c for c in dict.fromkeys(wanted) if c not in self.data.extra_keys]:
            extra = {"extra_keys": [*self.data.extra_keys, *missing]}
            object.__setattr__(self, "data", self.data.model_copy(update=extra))
        if not self.algorithm.response_tokens:
            length = {"response_tokens": r.max_response_tokens}
            object.__setattr__(self, "algorithm", self.algorithm.model_copy(update=length))  # frozen from here on
        stare = self.algorithm.stare
        if stare.target_schedule != "constant" and not stare.target_steps:
            settled = {"stare": stare.model_copy(update={"target_steps": self.run.steps})}
            object.__setattr__(self, "algorithm", self.algorithm.model_copy(update=settled))
        return self

    def _float8_fault(self) -> str:
        """Why engines or ranks may not multiply in float8 with the other settings; "" where they may."""
        given = (self.algorithm.correction.mode, self.trainer.scoring, self.sync.probe_every, self.sync.probe_threshold)
        fault, dtype = "", self.model.dtype
        if self.inference.quantization != "none":
            key = f'inference.quantization = "{self.inference.quantization}"'
            fault = float8.type_fault(key, dtype, ("bfloat16", "float16")) or float8.fault(key, *given)
        if self.trainer.fp8 != "none":
            fault = fault or self.trainer.fp8_type_fault(dtype) or float8.fault(self.trainer.fp8_key, *given)
        return fault
