"""The pass-through table `[inference.vllm]`, checked against vLLM's EngineArgs without importing vLLM (10 s)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError, suggest

# EngineArgs that have a key of their own, or on which log-probs and weight pushes depend.
RESERVED = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "inference.max_model_len",
    "tensor_parallel_size": "inference.tensor_parallel",
    "seed": "run.seed",
    "data_parallel_size": "inference.engines",
    "skip_tokenizer_init": "",
    "generation_config": "",
    "logprobs_mode": "",
    "weight_transfer_config": "",
    "worker_extension_cls": "",
    "enable_sleep_mode": "inference.placement",
}


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """Field names of the installed vLLM's EngineArgs and AsyncEngineArgs.

    Raises:
        UserError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise UserError("vLLM is not installed: install stare_megatron with the extra `cpu` or `gpu`")
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text())
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def check_engine_args(table: Mapping[str, Any]) -> None:
    """Refuse unknown and reserved keys.

    Raises:
        UserError: naming the key, and the nearest or the right one.
    """
    for key in table:
        if key in RESERVED:
            cure = f"set {RESERVED[key]} instead" if RESERVED[key] else "the run depends on its value"
            raise UserError(f"inference.vllm.{key} = {table[key]!r}: not settable here: {cure}")
        if key not in engine_arg_names():
            hint = suggest(key, engine_arg_names())
            raise UserError(f"inference.vllm.{key}: vLLM's EngineArgs has no such field{hint}")
