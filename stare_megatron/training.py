"""Settings of the Megatron-Core ranks, and of what they save: `[trainer]` and `[checkpoint]`."""

# A default given to Field by position is invisible to the type checker, which then misses arguments in `Section()`.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stare_megatron.methods import Section


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up, optimizer steps.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Decay after the warm-up.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of a decay.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam beta 1.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam beta 2.")
    eps: float = Field(1e-8, gt=0, description="Adam epsilon.")
    clip_grad: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")


class TrainerConfig(Section):
    world_size: int = Field(1, ge=1, description="Trainer ranks over all nodes; one GPU each.")
    tensor_parallel: int = Field(1, ge=1, description="TP: ranks that split each layer.")
    pipeline_parallel: int = Field(1, ge=1, description="PP: ranks that split the layers.")
    virtual_pipeline: int = Field(1, ge=1, description="Model chunks per pipeline rank (interleaved 1F1B when > 1).")
    context_parallel: int = Field(1, ge=1, description="CP: ranks that split each sequence.")
    expert_parallel: int = Field(1, ge=1, description="EP: ranks that split the experts (MoE).")
    sequence_parallel: bool = Field(False, description="Split norms and dropout over the TP ranks, by tokens.")
    distributed_optimizer: bool = Field(True, description="Split optimizer state over the data-parallel ranks.")
    micro_batch_tokens: int = Field(
        8192, ge=1, description="Token budget of a packed micro-batch; a longer sequence gets a micro-batch of its own."
    )
    logits_chunk_tokens: int = Field(
        0,
        ge=0,
        description="Rows of logits that exist at a time; they are made again in the backward pass. Bounds memory for "
        "long sequences. 0: off, all rows of a micro-batch are kept.",
    )
    updates_per_batch: int = Field(1, ge=1, description="Optimizer steps per update batch (mini-batches of groups).")
    scoring: Literal["trainer", "rollout"] = Field(
        "trainer",
        description="Log-probs and entropy before an update: of a forward pass, or, for one update a batch, of the "
        "engines, without a pass; see docs/scoring.md.",
    )
    recompute: Literal["none", "selective", "full"] = Field("none", description="Activation recomputation.")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="Optimizer settings.")
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="Further Megatron-Core TransformerConfig fields, by their upstream names."
    )

    @property
    def data_parallel(self) -> int:
        return self.world_size // (self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

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
        return self


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="Save every n steps; 0: only at the end and when interrupted.")
    asynchronous: bool = Field(
        True, description="Copy the state and write it while training goes on; false: wait until it is on disk."
    )
    keep_last: int = Field(2, ge=1, description="Newest training checkpoints kept.")
    keep_every: int = Field(0, ge=0, description="Training checkpoints of steps that are multiples stay; 0: none.")
    best_metric: str = Field(
        "",
        description="Metric of metrics.jsonl or eval.jsonl, e.g. `eval/avg`: the checkpoint with the best value stays; "
        "empty: none.",
    )
    best_mode: Literal["max", "min"] = Field("max", description="Which value of `best_metric` is the best.")
    verify: bool = Field(
        True, description="Compare checksums, which reads every byte, before a checkpoint is loaded; false: sizes only."
    )
    export_every: int = Field(
        0, ge=0, description="Write the policy as a Hugging Face checkpoint every n steps, to `exports/`; 0: never."
    )
    export_final: bool = Field(True, description="Write the final policy as a Hugging Face checkpoint.")
