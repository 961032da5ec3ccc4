"""The pass-through tables `[trainer.megatron]` and `[inference.vllm]`, checked against what is installed.

Field names are read from the source of upstream's configuration dataclasses, which is parsed and not run: importing
Megatron-Core costs seconds and, without a GPU, needs patches; importing vLLM costs ten seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError, nearest, suggest

_SHAPE = "it follows from the checkpoint, config.json in model.path"
_RUN = "the run sets it itself"
_NEEDED = "the run depends on its value"

# Fields with a key of their own here, or that the model's files or the run decide: name -> cure.
MEGATRON_RESERVED: Mapping[str, str] = {
    "tensor_model_parallel_size": "set trainer.tensor_parallel instead",
    "pipeline_model_parallel_size": "set trainer.pipeline_parallel instead",
    "virtual_pipeline_model_parallel_size": "set trainer.virtual_pipeline instead",
    "context_parallel_size": "set trainer.context_parallel instead",
    "expert_model_parallel_size": "set trainer.expert_parallel instead",
    "sequence_parallel": "set trainer.sequence_parallel instead",
    "recompute_granularity": "set trainer.recompute instead",
    "recompute_modules": "set trainer.recompute_modules instead",
    **dict.fromkeys(
        ("fp16", "bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"),
        "set model.dtype instead",
    ),
    **dict.fromkeys((
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
        "normalization", "layernorm_epsilon", "activation_func", "gated_linear_unit", "add_bias_linear",
        "add_qkv_bias", "qk_layernorm", "num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size",
        "moe_router_topk", "moe_router_pre_softmax", "multi_latent_attention", "rotary_interleaved",
    ), _SHAPE),
    # Dropout would make the scoring pass, the update and the engines disagree.
    **dict.fromkeys((
        "hidden_dropout", "attention_dropout", "use_cpu_initialization", "perform_initialization",
        "calculate_per_token_loss", "variable_seq_lengths", "overlap_p2p_comm", "batch_p2p_comm",
        "deallocate_pipeline_outputs", "grad_scale_func", "finalize_model_grads_func", "no_sync_func",
        "grad_sync_func", "param_sync_func", "timers", "init_method", "output_layer_init_method",
        "embedding_init_method",
    ), _RUN),
}  # fmt: skip

# EngineArgs that have a key of their own, or on which log-probs and weight pushes depend.
ENGINE_RESERVED: Mapping[str, str] = {
    "model": "set model.path instead",
    "tokenizer": "set model.path instead",
    "dtype": "set model.dtype instead",
    "max_model_len": "set inference.max_model_len instead",
    "tensor_parallel_size": "set inference.tensor_parallel instead",
    "seed": "set run.seed instead",
    "data_parallel_size": "set inference.engines instead",
    "enable_sleep_mode": "set inference.placement instead",
    **dict.fromkeys(
        (
            "skip_tokenizer_init",
            "generation_config",
            "logprobs_mode",
            "weight_transfer_config",
            "worker_extension_cls",
            "distributed_executor_backend",
        ),
        _NEEDED,
    ),
}


@functools.cache
def megatron_fields() -> frozenset[str]:
    """Field names of the installed Megatron-Core's TransformerConfig and its bases.

    Raises:
        UserError: Megatron-Core is not installed.
    """
    root = _installed("megatron", "core", "Megatron-Core")
    transformer = root / "transformer" / "transformer_config.py"
    return _fields(transformer, "TransformerConfig", "MLATransformerConfig") | _fields(
        root / "model_parallel_config.py", "ModelParallelConfig"
    )


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """Field names of the installed vLLM's EngineArgs and AsyncEngineArgs.

    Raises:
        UserError: vLLM is not installed.
    """
    return _fields(_installed("vllm", "engine", "vLLM") / "arg_utils.py", "EngineArgs", "AsyncEngineArgs")


def check_megatron(table: Mapping[str, Any]) -> None:
    """Refuse unknown and reserved keys of `[trainer.megatron]`.

    Raises:
        UserError: naming the key, and the nearest or the right one.
    """
    _check(table, "trainer.megatron", "Megatron-Core's TransformerConfig", MEGATRON_RESERVED, megatron_fields())


def check_engine_args(table: Mapping[str, Any]) -> None:
    """Refuse unknown and reserved keys of `[inference.vllm]`.

    Raises:
        UserError: naming the key, and the nearest or the right one.
    """
    _check(table, "inference.vllm", "vLLM's EngineArgs", ENGINE_RESERVED, engine_arg_names())


def _check(table: Mapping[str, Any], name: str, what: str, reserved: Mapping[str, str], known: frozenset[str]) -> None:
    for key, value in table.items():
        if key in reserved:
            raise UserError(f"{name}.{key} = {value!r}: not settable here: {reserved[key]}")
        if key not in known:
            cure = reserved.get(nearest(key, known))
            hint = suggest(key, known) + (f" It is not settable here: {cure}" if cure else "")
            raise UserError(f"{name}.{key}: {what} has no such field{hint}")


def _installed(package: str, folder: str, name: str) -> Path:
    """`folder` of an installed package, which may be a namespace package: its spec has locations then, not a file."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations or () if spec else ()
    found = next((Path(place) / folder for place in places if (Path(place) / folder).is_dir()), None)
    if found is None:
        raise UserError(f"{name} is not installed: install stare_megatron with the extra `cpu` or `gpu`")
    return found


def _fields(source: Path, *classes: str) -> frozenset[str]:
    """Annotated names in the bodies of `classes`, from a Python file that is parsed and not run."""
    return frozenset(
        field.target.id
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
