"""Tokens by the age of the policy that drew them: updates since then, 0 for the policy about to be updated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stare_megatron.algo.correction import correct
from stare_megatron.algo.losses.types import Sequences
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point
from stare_megatron.algo.selection import Selection
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.config import CorrectionConfig
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.scoring import MAX_RATIO_TERM, Scored, effective_share
from stare_megatron.types import Measured


@dataclass(frozen=True, eq=False)
class Ages:
    """`age_T` int64 [T] of the tokens of all optimizer steps, end to end, 0 where the policy drew none; `oldest`: the
    largest there can be, 0 where nobody samples ahead."""

    age_T: torch.Tensor
    oldest: int


def ages(data: Sequence[RankBatch], version: int, oldest: int) -> Ages:
    """`version`: of the policy about to be updated."""
    parts = [torch.where(d.batch.action_T, (version - d.batch.version_T).clamp(0, oldest), 0) for d in data]
    return Ages(torch.cat(parts), oldest)


def weigh_by_age(tokens: Candidates, ages: Ages, weigh: Callable[[Candidates], Weights]) -> Weights:
    """Weights of a selection within the tokens of each age.

    The mean surprisal of tokens under the policy about to be updated is the entropy of the policy that drew them, plus
    how far the two have come apart: it grows with age. One quantile of all tokens would choose old ones too often.
    """
    parts = []
    for age in range(ages.oldest + 1):
        own_T = tokens.action_T & (ages.age_T == age)
        parts.append(weigh(dataclasses.replace(tokens, action_T=own_T)))
    chosen = [part.selection for part in parts]
    return Weights(  # a token weighs 1 and is in no subset where it takes no part
        weight_T=torch.stack([part.weight_T for part in parts]).prod(0),
        subset_T=torch.stack([part.subset_T for part in parts]).amin(0),
        selection=Selection(
            selected_T=torch.stack([s.selected_T for s in chosen]).any(0),
            count_S=torch.stack([s.count_S for s in chosen]).sum(0),
            selected_S=torch.stack([s.selected_S for s in chosen]).sum(0),
            nan=torch.stack([s.nan for s in chosen]).sum(0),
        ),
    )


def measure(
    runner: Runner,
    data: Sequence[RankBatch],
    scored: Sequence[Scored],
    selected: Sequence[torch.Tensor],
    ages: Ages,
    config: CorrectionConfig,
) -> tuple[Measured, ...]:
    """Of the action tokens of each age that the update batch has: how many, their entropy and mismatch, their effective
    share under the ratios of trainer and engine and the share whose correction is at its bound, and which share of
    those with an advantage was selected (`selected`, bool [T] of each optimizer step). Exact sums, the same bits for
    every layout. A collective. Nothing where nobody samples ahead."""
    if not ages.oldest:
        return ()
    owned_T = torch.cat([d.owned_T for d in data])
    age_T = ages.age_T[owned_T]
    entropy_T = torch.cat([s.scores.entropy_T for s in scored])[owned_T]
    apart_T = torch.cat([s.raw_logprob_T - d.batch.rollout_logprob_T for d, s in zip(data, scored, strict=True)])
    ratio_T = apart_T[owned_T].double().exp().clamp(max=MAX_RATIO_TERM)
    bounded_T = torch.cat([_bounded(runner, d, s, config) for d, s in zip(data, scored, strict=True)])
    chosen_T = torch.cat(list(selected))[owned_T]
    told_T = torch.cat([d.batch.advantage_T for d in data])[owned_T] != 0
    rows = []
    for value in range(ages.oldest + 1):
        here_T = age_T == value
        summed = (entropy_T, apart_T[owned_T].abs(), ratio_T, ratio_T**2)
        counted = (here_T, here_T & bounded_T, here_T & told_T, here_T & chosen_T)
        sums = [fixed_point_sum(x_T[here_T])[0] for x_T in summed]
        rows.append(torch.stack([*sums, *(x_T.sum() for x_T in counted)]))
    totals = torch.stack(rows)
    if runner.is_last_stage:
        totals = runner.comm.sum(totals)
    found: list[Measured] = []
    for value, (*sums, tokens, bounded, told, chosen) in enumerate(runner.from_last_stage(totals).tolist()):
        entropy, gap, ratios, squares = map(from_fixed_point, sums)
        if tokens:
            found.append(Measured(f"age/{value}/tokens", tokens))
            found.append(Measured(f"age/{value}/entropy", entropy, tokens))
            found.append(Measured(f"age/{value}/mismatch", gap, tokens))
            found.append(Measured(f"age/{value}/ess", effective_share(ratios, squares, tokens)))
            found.append(Measured(f"age/{value}/bounded", bounded, tokens))
            found.append(Measured(f"age/{value}/selected", chosen, told))
    return tuple(found)


def _bounded(runner: Runner, data: RankBatch, scored: Scored, config: CorrectionConfig) -> torch.Tensor:
    """Of the action tokens counted on this rank: whether the correction is truncated or masked, bool. A collective."""
    batch, own_T = data.batch, data.owned_T
    sequences = Sequences(batch.sequence_T[own_T], batch.global_sequence_N.shape[0], runner.context_comm)
    return correct(scored.raw_logprob_T[own_T], batch.rollout_logprob_T[own_T], sequences, config).bounded_T
