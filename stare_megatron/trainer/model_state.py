"""A model's part of a distributed checkpoint, the same under every layer spec.

Megatron-Core's linears and most modules of Transformer Engine add an object `_extra_state`: the scales of FP8. At the
precisions of this package it is empty, and the two layer specs have it in different places, so that a checkpoint with
them loads into the spec it was saved under only. They are neither saved nor asked for, nor read where a checkpoint has
them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

_EXTRA = re.compile(r"_extra_state\d*$")  # numbered for the matrices of grouped experts


def sharded(module: torch.nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state dict of a model chunk that is not wrapped."""
    chunk: Any = module
    state = chunk.sharded_state_dict(metadata=dict(metadata))
    return {k: v for k, v in state.items() if not (isinstance(v, ShardedObject) and _EXTRA.search(v.key))}


def load(module: torch.nn.Module, state: Mapping[str, Any], in_place: Collection[str] = ()) -> None:
    """Take the values that were loaded for `sharded`. `in_place`: names of what is where it belongs already.

    Raises:
        RuntimeError: a parameter or buffer is missing, or one is too many.
    """
    wrong = module.load_state_dict({k: v for k, v in state.items() if not _EXTRA.search(k)}, strict=False)
    missing = [key for key in wrong.missing_keys if not _EXTRA.search(key) and key not in in_place]
    if missing or wrong.unexpected_keys:
        raise RuntimeError(f"missing from the state: {missing}; unknown to the model: {wrong.unexpected_keys}")
