"""What a checkpoint computes, without a run: one rank, float32, no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config

from stare_megatron.config import TrainerConfig
from stare_megatron.trainer import parallel
from stare_megatron.trainer.model import build_model


def megatron_logits(
    model_path: Path, weights: Path | None, sequences: Sequence[torch.Tensor], *, port: int
) -> torch.Tensor:
    """Logits float32 [tokens, vocabulary] of sequences of token ids, packed, on a CPU.

    `weights`: a Megatron-Core checkpoint; None: the Hugging Face ones in `model_path`. Joins process groups of one rank
    and leaves them: for a process of its own.

    Raises:
        UserError: an unsupported, damaged or foreign checkpoint.
    """
    trainer = TrainerConfig()
    parallel.initialize(
        trainer, rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=port, seed=0, timeout_s=60
    )
    lengths = [len(ids) for ids in sequences]
    device = torch.device("cpu")
    model = build_model(model_path, torch.float32, trainer, device, max(lengths), weights)[0]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.cat(list(sequences))[None]
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            position_ids=torch.zeros_like(tokens),
            attention_mask=None,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=starts,
                cu_seqlens_kv=starts,
                max_seqlen_q=max(lengths),
                max_seqlen_kv=max(lengths),
            ),
        )
    vocab = get_model_config(model).shape.vocab
    parallel.shutdown()
    return logits[0, :, :vocab]
