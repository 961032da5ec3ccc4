"""The policy as Megatron-Core model chunks, loaded from a Hugging Face checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from stare_megatron.config import TrainerConfig
from stare_megatron.config.float8 import FORMATS
from stare_megatron.config.upstream import check_megatron, megatron_lacking
from stare_megatron.errors import UserError
from stare_megatron.host import device as devices
from stare_megatron.models import rotary
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.layout import check_fp8, padded_vocab, recompute_modules
from stare_megatron.models.shape import ModelShape
from stare_megatron.trainer import bridge, float8, initial_weights, parallel, rope, spec
from stare_megatron.trainer.head import PolicyModel


@dataclass
class PolicyConfig(TransformerConfig):
    """Megatron-Core's configuration, with the shape of the model it was made from.

    Gradient convention (the one place it is set): the loss a micro-batch passes to backward is already divided by the
    denominator of the whole update, so gradients are SUMMED over data- and context-parallel ranks and over
    micro-batches, and divided by nothing. Upstream does that when `calculate_per_token_loss` is true, the loss function
    returns three values (loss, number of tokens, anything) and `finalize_model_grads` is not told the number of tokens.
    """

    shape: ModelShape = None  # type: ignore[assignment]  # dataclass inheritance wants a default


def _finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Upstream's reduction of gradients without its division by `num_tokens`: see `PolicyConfig`."""
    finalize_model_grads(model, None, **kwargs)


def policy_config(shape: ModelShape, dtype: torch.dtype, trainer: TrainerConfig) -> PolicyConfig:
    """The model's and the run's settings as Megatron-Core wants them. Needs `parallel.initialize`.

    Raises:
        UserError: the layout does not fit the model, upstream refuses the combination, or the GPU has no such float8.
    """
    engine = spec.providers().transformer_engine
    check_megatron(trainer.megatron, megatron_lacking(trainer, experts=shape.experts is not None, engine=engine))
    check_fp8(trainer, shape, engine)
    shape.check_layout(
        tensor_parallel=trainer.tensor_parallel,
        pipeline_parallel=trainer.pipeline_parallel,
        virtual_pipeline=trainer.virtual_pipeline,
        expert_parallel=trainer.expert_parallel,
    )
    settings: dict[str, Any] = {
        "shape": shape,
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": trainer.tensor_parallel,
        "pipeline_model_parallel_size": trainer.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline(trainer),
        "context_parallel_size": trainer.context_parallel,
        "expert_model_parallel_size": trainer.expert_parallel,
        "expert_tensor_parallel_size": trainer.expert_tensor_parallel,
        "sequence_parallel": trainer.sequence_parallel,
        # Every parameter is read from the checkpoint.
        "perform_initialization": False,
        "use_cpu_initialization": devices.current() is devices.Device.CPU,
        # Packs differ in length, so stages tell each other the shapes.
        "variable_seq_lengths": trainer.pipeline_parallel > 1,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _finalize,
        **spec.fusion_settings(),
        **_number_settings(dtype, trainer),
    }
    if shape.experts is not None:
        settings |= {
            "num_moe_experts": shape.experts.number,
            "moe_ffn_hidden_size": shape.experts.ffn,
            "moe_router_topk": shape.experts.top_k,
            "moe_router_pre_softmax": not shape.experts.normalize,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
        }
        if shape.experts.shared_ffn:
            settings |= {
                "moe_shared_expert_intermediate_size": shape.experts.shared_ffn,
                "moe_shared_expert_gate": True,
            }
    if isinstance(shape.rope_scaling, rotary.Yarn):
        # All dimensions of queries and keys are rotated, so the scale of both is one of their products.
        settings["softmax_scale"] = shape.rope_scaling.attention**2 / shape.head_dim**0.5
    if trainer.virtual_pipeline > 1:
        # With two stages, batched messages to "previous" and "next" are between the same pair and get mixed up.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    settings |= _recompute_settings(shape, trainer)
    try:
        config = PolicyConfig(**(settings | trainer.megatron))
    except (ValueError, AssertionError, TypeError) as e:
        raise UserError(f"Megatron-Core refuses the settings of [trainer]: {e}") from e
    if trainer.fp8 != "none":
        float8.check_device(config)
    return config


def _number_settings(dtype: torch.dtype, trainer: TrainerConfig) -> dict[str, Any]:
    """TransformerConfig fields of what numbers are kept and multiplied in."""
    settings: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if trainer.fp8 != "none":
        settings |= {"fp8": FORMATS[trainer.fp8], "fp8_recipe": trainer.fp8}
    return settings


def _recompute_settings(shape: ModelShape, trainer: TrainerConfig) -> dict[str, Any]:
    """TransformerConfig fields of `trainer.recompute`. Raises: UserError: a module that cannot be recomputed."""
    if trainer.recompute == "none":
        return {}
    if trainer.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = recompute_modules(trainer, shape)
    if {"layernorm", "moe_act"} & set(modules) and not spec.providers().transformer_engine:
        # Upstream recomputes these two with code that names Transformer Engine's classes.
        raise UserError(
            f"trainer.recompute_modules = {modules}: layernorm and moe_act need Transformer Engine, which does not "
            "serve the layers here; leave them out"
        )
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def build_model(
    model_path: Path,
    dtype: torch.dtype,
    trainer: TrainerConfig,
    device: torch.device,
    window: int,
    distributed: Path | None = None,
) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them) with the checkpoint's weights. A collective.

    `distributed`: a Megatron-Core checkpoint to take the weights from instead; the configuration is `model_path`'s.

    `dtype`: of parameters and activations; gradients are accumulated and reduced in
    `trainer.optimizer.main_grads_dtype`.
    `window`: longest sequence, tokens. The logits of the last stage are [batch, tokens, padded vocabulary / TP], in
    `dtype`; columns from `config.shape.vocab` on are padding.
    A packed micro-batch is passed as input_ids [1, T], position_ids [1, T], attention_mask None and PackedSeqParams of
    format "thd" whose `max_seqlen_q` is exactly the longest sequence: upstream's rotary embedding takes a larger value
    that happens to equal T for a table of positions over the whole pack.

    Raises:
        UserError: an unsupported checkpoint, an impossible layout, or a weight beyond float16.
    """
    config = policy_config(read_hf_config(model_path), dtype, trainer)
    chunks = [_chunk(config, stage, window) for stage in range(trainer.virtual_pipeline)]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.to(dtype)
        chunk.to(device)
    bridge.mark_split(chunks)
    if distributed is None:
        bridge.load_weights(chunks, model_path)
    else:
        initial_weights.load(distributed, chunks)
    if dtype is torch.float16:
        refuse_overflow(chunks, distributed or model_path)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=trainer.optimizer.main_grads_dtype == "float32",
        use_distributed_optimizer=trainer.distributed_optimizer,
    )
    return [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def refuse_overflow(chunks: Sequence[torch.nn.Module], source: Path) -> None:
    """Raises: UserError: a weight of float16 chunks is infinite."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{source}: {name} has values beyond float16's range; set model.dtype = 'bfloat16'")


def _chunk(config: PolicyConfig, stage: int, window: int) -> PolicyModel:
    shape = config.shape
    vp_stage = stage if config.virtual_pipeline_model_parallel_size else None
    where = functools.partial(dict, ignore_virtual=False, vp_stage=vp_stage)
    chunk = PolicyModel(
        config=config,
        transformer_layer_spec=spec.block_spec(config, vp_stage),  # type: ignore[arg-type]
        vocab_size=padded_vocab(shape.vocab, config.tensor_model_parallel_size),
        max_sequence_length=window,
        pre_process=parallel_state.is_pipeline_first_stage(**where()),
        post_process=parallel_state.is_pipeline_last_stage(**where()),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]
        vp_stage=vp_stage,
    )
    if shape.rope_scaling is not None:
        plain = chunk.rotary_pos_emb.inv_freq
        chunk.rotary_pos_emb.inv_freq = rope.scaled(plain, shape.rope_theta, shape.rope_scaling)
    return chunk
