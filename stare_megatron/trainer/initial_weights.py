"""Weights of a model from a Megatron-Core checkpoint: a converted one, or a training checkpoint of another run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from stare_megatron.errors import UserError
from stare_megatron.trainer import model_state
from stare_megatron.trainer.checkpoint import CONTENT


def load(folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill this rank's chunks (not wrapped) from a `torch_dist` checkpoint saved at any layout. A collective.

    What the checkpoint holds besides (optimizer, random states) is not read. Values are cast to the parameters' dtype.

    Raises:
        UserError: no such checkpoint, a damaged one, or one of another model.
    """
    if not (folder / "metadata.json").is_file():
        raise UserError(f"{folder}: not a Megatron-Core checkpoint (no metadata.json)")
    wanted = {f"model{i}": model_state.sharded(module, CONTENT) for i, module in enumerate(chunks)}
    try:
        state: Any = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointingException, CheckpointException) as e:
        # torch's exception wraps that of the first rank that failed.
        cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        reason = str(cause).partition("\n")[0].partition(" from model not in state dict")[0][:200]
        raise UserError(f"{folder}: cannot be loaded into this model: {reason}") from e
    for i, module in enumerate(chunks):
        model_state.load(module, state[f"model{i}"])
