"""Settings of the Megatron-Core ranks: `[trainer]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config import float8
from stare_megatron.config.base import Free, PassThrough, Section

_TRIAL_STEPS = 100

# What a rank holds, by class. `optimizer`: master weights and moments.
StateClass = Literal["gradients", "optimizer", "parameters"]
# Not float8, of which Transformer Engine keeps a transposed copy beside each on Hopper: as many bytes as bfloat16's.
MomentType = Literal["float32", "bfloat16", "float16"]


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0, le=1, description="Peak learning rate.")
    warmup_steps: int = Field(default=0, ge=0, description="Linear warm-up, optimizer steps.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Decay after the warm-up."
    )
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of a decay.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="AdamW weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam beta 1.")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Adam beta 2.")
    eps: float = Field(default=1e-8, gt=0, le=1, description="Adam epsilon.")
    clip_grad: float = Field(default=1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    initial_loss_scale: float = Field(
        default=65536.0,
        ge=1,
        le=2.0**32,
        description="float16: factor of the loss that keeps small gradients from vanishing. Halved by a step whose "
        "gradients overflow, which changes no weight.",
    )
    loss_scale_window: int = Field(
        default=100, ge=1, description="float16: optimizer steps without overflow after which the factor is doubled."
    )

    precision_aware: bool = Field(
        default=False,
        description="Keep of the float32 master weights only what bfloat16 parameters do not have, 2 bytes in place of "
        "4 with no bit lost, and allow the types below. For Transformer Engine's Adam; see docs/memory.md.",
    )
    exp_avg_dtype: MomentType = Field(
        default="float32", description="Type of Adam's first moment, with `precision_aware`."
    )
    exp_avg_sq_dtype: MomentType = Field(
        default="float32", description="Type of Adam's second moment, with `precision_aware`."
    )
    main_grads_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type in which gradients are added up over micro-batches and ranks, with `precision_aware`.",
    )

    @model_validator(mode="after")
    def _types(self) -> OptimizerConfig:
        for key, dtype in self.types.items():
            if dtype != "float32" and not self.precision_aware:
                raise ValueError(f'{key} = "{dtype}" is for precision_aware = true; set it, or leave {key} out')
        return self

    @property
    def types(self) -> dict[str, str]:
        """Those of the moments and of the gradients, by their keys."""
        return {
            "exp_avg_dtype": self.exp_avg_dtype,
            "exp_avg_sq_dtype": self.exp_avg_sq_dtype,
            "main_grads_dtype": self.main_grads_dtype,
        }

    def type_fault(self, dtype: str) -> str:
        """Why the types do not fit a model of `dtype`, "" where they do."""
        if self.precision_aware and dtype == "float32":
            return (
                "trainer.optimizer.precision_aware = true is for master weights, and a model of model.dtype = "
                '"float32" has none; set model.dtype = "bfloat16", or take it out'
            )
        if self.main_grads_dtype == "bfloat16" and dtype != "bfloat16":
            return (
                f'trainer.optimizer.main_grads_dtype = "bfloat16" needs model.dtype = "bfloat16", it is "{dtype}": '
                "gradients are added up in float32 or in the type of the parameters"
            )
        return ""

    @model_validator(mode="after")
    def _decay(self) -> OptimizerConfig:
        if self.min_lr and self.schedule == "constant":
            raise ValueError(f'min_lr = {self.min_lr} is for schedule = "cosine" or "linear", not "constant"')
        if self.min_lr >= self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is not below lr = {self.lr}: the rate would not fall")
        return self

    def fault(self, steps: int) -> str:
        """Why the schedule does not fit a run of `steps` optimizer steps, "" where it does."""
        decay = 2 if self.schedule != "constant" else 0  # steps after the warm-up, at least
        if not self.warmup_steps or self.warmup_steps + decay <= steps:
            return ""
        return (
            f"trainer.optimizer.warmup_steps = {self.warmup_steps} with schedule = {self.schedule!r} needs at least "
            f"{self.warmup_steps + decay} optimizer steps, run.steps x trainer.updates_per_batch are {steps}; lengthen "
            "the run, or lower it"
        )

    @property
    def short_warmup(self) -> bool:
        """Whether a run shorter than the warm-up may be a trial of a configuration that was made for a longer one."""
        return self.warmup_steps <= _TRIAL_STEPS


class TrainerConfig(Section):
    world_size: Free[int] = Field(default=1, ge=1, le=2**16, description="Trainer ranks over all nodes; one GPU each.")
    tensor_parallel: Free[int] = Field(default=1, ge=1, description="TP: ranks that split each layer.")
    pipeline_parallel: Free[int] = Field(default=1, ge=1, description="PP: ranks that split the layers.")
    virtual_pipeline: Free[int] = Field(
        default=1, ge=1, description="Model chunks per pipeline rank (interleaved 1F1B when > 1)."
    )
    context_parallel: Free[int] = Field(default=1, ge=1, description="CP: ranks that split each sequence.")
    expert_parallel: Free[int] = Field(default=1, ge=1, description="EP: ranks that split the experts (MoE).")
    sequence_parallel: Free[bool] = Field(
        default=False, description="Split norms and dropout over the TP ranks, by tokens."
    )
    distributed_optimizer: Free[bool] = Field(
        default=True, description="Split optimizer state over the data-parallel ranks."
    )
    micro_batch_tokens: Free[int] = Field(
        default=8192,
        ge=1,
        description="Token budget of a packed micro-batch; a longer sequence gets a micro-batch of its own.",
    )
    logits_chunk_tokens: Free[int] = Field(
        default=0,
        ge=0,
        description="Rows of logits that exist at a time; they are recomputed in the backward pass. Bounds memory for "
        "long sequences. 0: off, all rows of a micro-batch are kept.",
    )
    updates_per_batch: int = Field(
        default=1, ge=1, description="Optimizer steps per update batch (mini-batches of groups)."
    )
    scoring: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="Log-probs and entropy before an update: of a forward pass, or, for one update a batch, of the "
        "engines, without a pass; see docs/scoring.md.",
    )
    fp8: float8.Recipe = Field(
        default="none",
        description="How Transformer Engine multiplies the layers' matrices, in every pass: in `model.dtype`, or in "
        "float8 with a scale for a tensor, for blocks of 128, or (Blackwell) of 32; see docs/quantization.md.",
    )
    recompute: Free[Literal["none", "selective", "full"]] = Field(
        default="none", description="Activation recomputation: of the layers' parts in `recompute_modules`, or of all."
    )
    recompute_modules: Free[list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]]] = Field(
        default=[],
        description='What `recompute = "selective"` computes again: `mlp` (a dense model\'s), `moe`, `moe_act` or '
        "`shared_experts` (a mixture of experts', its experts' activation alone, its expert that is shared), "
        "`layernorm`, `core_attn`; empty: `mlp` or `moe`.",
    )
    offload: Free[list[StateClass]] = Field(
        default=[],
        description="What leaves a rank's GPU for host memory while it is not used: `optimizer` (master weights and "
        "moments) outside the optimizer step, `gradients` (given up, not copied) outside the update, `parameters` "
        "while colocated engines sample; see docs/memory.md.",
    )
    offload_step_mb: Free[int] = Field(
        default=0,
        ge=0,
        le=2**20,
        description='Most of the optimizer state that a step with `offload = ["optimizer"]` has on the GPU at a time, '
        "MiB: it comes and goes in bundles. 0: all of it.",
    )
    offload_residue_mb: Free[int] = Field(
        default=2048,
        ge=0,
        le=2**20,
        description="Most that `offload` may leave of a rank on its GPU beside the classes that stay, MiB; more ends "
        "the run, naming the largest tensors.",
    )
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="Optimizer settings.")
    megatron: PassThrough = Field(
        default_factory=dict, description="Further Megatron-Core TransformerConfig fields, by their upstream names."
    )

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

    @property
    def expert_tensor_parallel(self) -> int:
        """Ranks that split one expert: `megatron.expert_tensor_parallel_size`, upstream's default is TP."""
        return int(self.megatron.get("expert_tensor_parallel_size") or self.tensor_parallel)

    @property
    def fp8_key(self) -> str:
        """The setting as messages name it."""
        return f'trainer.fp8 = "{self.fp8}"'

    def fp8_type_fault(self, dtype: str) -> str:
        """Why `fp8` may not be used with `model.dtype`, with the cure; "" where it may."""
        return "" if self.fp8 == "none" else float8.type_fault(self.fp8_key, dtype, ("bfloat16",))

    @property
    def lockstep(self) -> int:
        """Consecutive data-parallel ranks that meet in every micro-batch, because each has some of the experts."""
        experts = self.expert_parallel * self.expert_tensor_parallel
        return max(1, experts // (self.tensor_parallel * self.context_parallel))

    @model_validator(mode="after")
    def _layout(self) -> TrainerConfig:
        ranks = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if self.world_size % ranks:
            raise ValueError(
                f"world_size {self.world_size} is not a multiple of tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel} x context_parallel {self.context_parallel} = {ranks}"
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline_parallel > 1")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_parallel > 1")
        if self.optimizer.precision_aware and not self.distributed_optimizer:
            raise ValueError(
                "optimizer.precision_aware = true needs distributed_optimizer = true, the only one of Megatron-Core's "
                "optimizers that has it"
            )
        if self.offload_step_mb and "optimizer" not in self.offload:
            raise ValueError(
                f'offload_step_mb = {self.offload_step_mb} is for offload = ["optimizer"], it is {self.offload}'
            )
        if self.recompute_modules and self.recompute != "selective":
            raise ValueError(
                f'recompute_modules = {self.recompute_modules} is for recompute = "selective", it is "{self.recompute}"'
            )
        return self
