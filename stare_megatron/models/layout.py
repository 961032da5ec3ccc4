"""How a model may be split over ranks: rules of Megatron-Core that no configuration file knows."""

from __future__ import annotations

from stare_megatron.config import TrainerConfig
from stare_megatron.config.float8 import BLOCKS
from stare_megatron.errors import UserError
from stare_megatron.models.shape import ModelShape

_GIB = 2**30
GPU_PUSH_BUCKET = 64 << 20
"""Most bytes of a message of a sharded push between GPUs, of which a rank has two under way."""


def check_layout(config: TrainerConfig, gpus: bool | None) -> None:
    """What `TrainerConfig` cannot know without Megatron-Core's rules. `gpus`: the ranks are on some; None: not known.

    Raises:
        UserError: no such layout.
    """
    ranks = config.world_size // config.pipeline_parallel
    expert_tensor = config.expert_tensor_parallel
    if ranks % (config.expert_parallel * expert_tensor):
        raise UserError(
            f"trainer.expert_parallel = {config.expert_parallel} x expert tensor parallel {expert_tensor} does not "
            f"divide the {ranks} ranks of a pipeline stage (trainer.world_size / trainer.pipeline_parallel); lower "
            f"one, or set trainer.megatron.expert_tensor_parallel_size = 1"
        )
    if config.expert_parallel > 1 and expert_tensor > 1 and gpus is False:
        # The token dispatcher then gathers tensors of different lengths, which gloo does not.
        raise UserError(
            f"trainer.expert_parallel = {config.expert_parallel} with experts split over {expert_tensor} "
            f"tensor-parallel ranks does not run on CPUs; set trainer.megatron.expert_tensor_parallel_size = 1"
        )
    if config.expert_parallel > 1 and config.tensor_parallel > 1 and not config.sequence_parallel:
        raise UserError("trainer.expert_parallel > 1 with tensor_parallel > 1 needs trainer.sequence_parallel = true")


def check_experts(config: TrainerConfig, shape: ModelShape) -> None:
    """Raises: UserError: experts in a layout that upstream does not train (moe_layer.py, `MoELayer.forward`)."""
    if shape.experts and config.tensor_parallel > 1 and not config.sequence_parallel:
        raise UserError(
            f"trainer.tensor_parallel = {config.tensor_parallel} and a model with experts need "
            "trainer.sequence_parallel = true"
        )


def check_fp8(config: TrainerConfig, shape: ModelShape, engine: bool | None) -> None:
    """`engine`: the layers are Transformer Engine's, None: not known yet.

    Raises:
        UserError: `trainer.fp8` without it, with experts, or with a rank's matrix that is not made of whole blocks.
    """
    if config.fp8 == "none":
        return
    key = config.fp8_key
    if engine is False:
        raise UserError(f"{key}: it is for Transformer Engine's layers, and those here are torch's; leave it out")
    if shape.experts is not None:
        raise UserError(f"{key}: that experts are trained right in float8 has not been shown; leave it out")
    block, t = BLOCKS[config.fp8], config.tensor_parallel
    widths = {
        "hidden": shape.hidden,
        "queries, keys and values": (shape.heads + 2 * shape.kv_groups) * shape.head_dim // t,
        "attention": shape.heads * shape.head_dim // t,
        "MLP": shape.ffn // t,
    }
    for name, width in widths.items():
        if width % block:
            raise UserError(
                f"{key}: it multiplies blocks of {block}, and a rank's {name} are {width} wide with "
                f'trainer.tensor_parallel = {t}; lower it, or set trainer.fp8 = "tensorwise"'
            )


def recompute_modules(config: TrainerConfig, shape: ModelShape) -> list[str]:
    """The parts of a layer that `trainer.recompute = "selective"` computes again, by Megatron-Core's names.

    Where none is asked for, the largest activations a layer keeps: the MLP's, or the experts'. Upstream's own default
    is the attention's core, of which the fused kernels keep almost nothing.

    Raises:
        UserError: a part that this model does not have.
    """
    dense = shape.experts is None
    if "shared_experts" in config.recompute_modules and not (shape.experts and shape.experts.shared_ffn):
        raise UserError(
            "trainer.recompute_modules names 'shared_experts', but the model has no expert that is shared; leave it out"
        )
    if (
        other := {"moe", "moe_act"} & set(config.recompute_modules)
        if dense
        else {"mlp"} & set(config.recompute_modules)
    ):
        kind, cure = ("no experts", "mlp") if dense else ("experts in every layer", "moe")
        raise UserError(
            f"trainer.recompute_modules names {sorted(other)[0]!r}, but the model has {kind}; use {cure!r} instead"
        )
    return list(config.recompute_modules) or ["mlp" if dense else "moe"]


def element_bytes(dtype: str) -> int:
    """Of one number in `model.dtype`."""
    return 4 if dtype == "float32" else 2


def kv_token_bytes(shape: ModelShape, tensor_parallel: int, dtype: str) -> int:
    """Keys and values of a token on one rank of an engine; fewer heads than ranks are repeated."""
    heads = max(1, shape.kv_groups // tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * element_bytes(dtype)


def push_buffers(shape: ModelShape, dtype: str, method: str) -> int:
    """Bytes that a push takes of a rank's GPU. `method`: `sync.method`. Of whole tensors the largest is gathered,
    copied, and packed into a buffer of at least 1 GiB; where each engine gets its parts there are two buckets."""
    if method == "sharded":
        return 2 * GPU_PUSH_BUCKET
    largest = shape.vocab * shape.hidden * element_bytes(dtype)
    return 3 * largest + max(largest, _GIB)


def padded_vocab(vocab: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the next multiple of 128, or of 128 x TP where TP does not divide 128."""
    multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
    return -(-vocab // multiple) * multiple
