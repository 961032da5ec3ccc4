"""Trains one batch of given groups, and says what the trainer makes of their tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from launch import Rank
from step_cases import load, make_config, start

from stare_megatron.types import Control, Group


def train(rank: Rank, *, checkpoint: Path, groups: list[Group], overrides: dict[str, Any]) -> dict[str, Any]:
    """`tokens`: of the batch, by sequence; `logprobs`: float32 [n - 1] of every trajectory that is learned from, each
    scored by itself; `scores`, `updates`: of the step."""
    config = make_config(checkpoint, overrides)
    trainer = start(rank, config)
    kept = [t for g in groups for t in g.trajectories if t.status.is_trainable and t.num_action_tokens]
    logprobs = {(t.prompt_id, t.sample): trainer.score_tokens(t.token_ids()) for t in kept}
    load(trainer, config, groups)
    batch = trainer._loaded[0].batch
    bounds = batch.cu_seqlens_N1.tolist()
    tokens = [batch.token_ids_T[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    actions = [batch.action_T[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    entropy = trainer.score().entropy
    done = trainer.update(Control(True, 1.5, 0.5, entropy, 9.0))
    trainer.close()
    return {
        "tokens": tokens,
        "actions": actions,
        "logprobs": logprobs,
        "scores": done.scores,
        "updates": done.updates,
    }
