"""An update batch on a rank: from the groups that a share names to what its passes run over."""

from __future__ import annotations

from collections.abc import Sequence

from stare_megatron.algo.registry import Algorithm
from stare_megatron.config import AlgorithmConfig
from stare_megatron.models.shape import ModelShape
from stare_megatron.trainer.model_runner import RankBatch, Runner, rank_batch
from stare_megatron.trainer.replay import routed_experts
from stare_megatron.trainer.sequence import SequenceLayout, token_batch
from stare_megatron.types import Group, UpdateShare

Sampled = Sequence[tuple[list[Group], UpdateShare]]


def rank_batches(
    sampled: Sampled,
    runner: Runner,
    layout: SequenceLayout,
    shape: ModelShape,
    algorithm: Algorithm,
    config: AlgorithmConfig,
) -> list[RankBatch]:
    """One for each optimizer step of `sampled`.

    Raises:
        RunError: with `inference.routing_replay`, a trajectory without its experts.
    """
    made = []
    for groups, share in sampled:
        batch = token_batch(groups, share, algorithm, config, runner.place)
        experts_TLK = None
        if runner.replay is not None:
            experts_TLK = routed_experts(groups, share, runner.replay.layers, shape).to(batch.action_T.device)
        made.append(rank_batch(batch, share, layout, config, experts_TLK))
    return made
