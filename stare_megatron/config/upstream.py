"""The pass-through table `[trainer.megatron]`, checked against the installed Megatron-Core without importing it.

The fields are read from the source of its configuration dataclasses: the import costs seconds and, without a GPU, needs
patches. The twin for `[inference.vllm]` is `inference/options.py`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError, nearest, suggest

_SOURCES = (
    ("core/transformer/transformer_config.py", ("TransformerConfig", "MLATransformerConfig")),
    ("core/model_parallel_config.py", ("ModelParallelConfig",)),
)

_SHAPE = "it follows from the checkpoint, config.json in model.path"
_RUN = "the run sets it itself"

# Fields with a key of their own here, or that the model's files or the run decide: name -> cure.
RESERVED: Mapping[str, str] = {
    "tensor_model_parallel_size": "set trainer.tensor_parallel instead",
    "pipeline_model_parallel_size": "set trainer.pipeline_parallel instead",
    "virtual_pipeline_model_parallel_size": "set trainer.virtual_pipeline instead",
    "context_parallel_size": "set trainer.context_parallel instead",
    "expert_model_parallel_size": "set trainer.expert_parallel instead",
    "sequence_parallel": "set trainer.sequence_parallel instead",
    "recompute_granularity": "set trainer.recompute instead",
    **dict.fromkeys(
        ("fp16", "bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast"),
        "set model.dtype instead",
    ),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "ffn_hidden_size",
            "kv_channels",
            "normalization",
            "layernorm_epsilon",
            "activation_func",
            "gated_linear_unit",
            "add_bias_linear",
            "add_qkv_bias",
            "qk_layernorm",
            "num_moe_experts",
            "moe_layer_freq",
            "moe_ffn_hidden_size",
            "moe_router_topk",
            "moe_router_pre_softmax",
            "multi_latent_attention",
            "rotary_interleaved",
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        (
            "use_cpu_initialization",
            "perform_initialization",
            "calculate_per_token_loss",
            "variable_seq_lengths",
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "deallocate_pipeline_outputs",
            "grad_scale_func",
            "finalize_model_grads_func",
            "no_sync_func",
            "grad_sync_func",
            "param_sync_func",
            "timers",
            "init_method",
            "output_layer_init_method",
            "embedding_init_method",
        ),
        _RUN,
    ),
    # Dropout would make the scoring pass, the update and the engines disagree.
    "hidden_dropout": _RUN,
    "attention_dropout": _RUN,
}


@functools.cache
def megatron_fields() -> frozenset[str]:
    """Field names of the installed Megatron-Core's TransformerConfig and its bases.

    Raises:
        UserError: Megatron-Core is not installed.
    """
    # `megatron` is a namespace package: its spec has locations, not a file.
    spec = importlib.util.find_spec("megatron")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    roots = [Path(place) for place in locations if (Path(place) / "core").is_dir()]
    if not roots:
        raise UserError("Megatron-Core is not installed: install stare_megatron with the extra `cpu` or `gpu`")
    names: set[str] = set()
    for file, classes in _SOURCES:
        names |= dataclass_fields(roots[0] / file, classes)
    return frozenset(names)


def dataclass_fields(source: Path, classes: tuple[str, ...]) -> set[str]:
    """Annotated names in the bodies of `classes`, from a Python file that is parsed and not run."""
    return {
        field.target.id
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def check_megatron(table: Mapping[str, Any]) -> None:
    """Refuse unknown and reserved keys of `[trainer.megatron]`.

    Raises:
        UserError: naming the key, and the nearest or the right one.
    """
    for key, value in table.items():
        if key in RESERVED:
            raise UserError(f"trainer.megatron.{key} = {value!r}: not settable here: {RESERVED[key]}")
        if key not in megatron_fields():
            cure = RESERVED.get(nearest(key, megatron_fields()))
            hint = suggest(key, megatron_fields()) + (f" It is not settable here: {cure}" if cure else "")
            raise UserError(f"trainer.megatron.{key}: Megatron-Core's TransformerConfig has no such field{hint}")
