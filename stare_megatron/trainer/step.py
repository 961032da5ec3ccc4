"""Token weights, and forward and backward over packed micro-batches.

Every sum over tokens is a plain sum over micro-batches and ranks: the loss is divided beforehand by ONE global
denominator (`algo.reduce`). So micro-batch budgets, packing, DP, CP and PP do not change the result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stare_megatron.algo import dynamics
from stare_megatron.algo.correction import Correction, correct
from stare_megatron.algo.kl import with_kl
from stare_megatron.algo.losses.types import LossInputs, Reported, Sequences, TokenLoss
from stare_megatron.algo.registry import Algorithm
from stare_megatron.algo.selection import NEGATIVE, POSITIVE
from stare_megatron.algo.stare import Candidates, ScoredCandidates, Weights, raising
from stare_megatron.algo.surrogate import kl_estimate
from stare_megatron.config import AlgorithmConfig
from stare_megatron.trainer.ages import Ages, weigh_by_age
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.reference import ReferencedBatch
from stare_megatron.trainer.scoring import Scored, ScoredBatch, candidates
from stare_megatron.trainer.sequence import MicroBatch
from stare_megatron.trainer.tally import Tally
from stare_megatron.types import (
    Control,
    EntropyReading,
    ForcedReading,
    Measured,
    Measurements,
    Scores,
    TokenBatch,
)
from stare_megatron.types.token_record import TokenRecord


def weigh(
    runner: Runner,
    data: Sequence[RankBatch],
    tokens: Candidates,
    control: Control,
    algorithm: Algorithm,
    config: AlgorithmConfig,
    ages: Ages,
) -> list[Weights]:
    """Token weights of all optimizer steps, selected ONCE over the whole update batch of all data- and
    context-parallel ranks, from what was known before the update. A collective of the last pipeline stage.

    `tokens`: of all steps, end to end. STARE's quantile is taken within the tokens of each of the `ages`. (The
    reference re-selects for every mini-batch under the weights of that moment.)
    """
    sizes = [d.batch.token_ids_T.shape[0] for d in data]

    def chosen(part: Candidates) -> Weights:
        return algorithm.weigh(part, control, config, runner.comm)

    by_age = ages.oldest > 0 and config.method == "stare" and config.stare.weight == "fixed"
    whole = weigh_by_age(tokens, ages, chosen) if by_age else chosen(tokens)
    return [
        Weights(weight_T, subset_T, selection)
        for weight_T, subset_T, selection in zip(
            whole.weight_T.split(sizes), whole.subset_T.split(sizes), whole.selection.split(sizes), strict=True
        )
    ]


def entropy_reading(
    runner: Runner, known: ScoredBatch, algorithm: Algorithm, config: AlgorithmConfig, ages: Ages
) -> EntropyReading:
    """What the controller of the method reads of a scored batch; equal on every rank. A collective."""
    count, entropy = known.summary.num_action_tokens, known.summary["policy/entropy"]
    if not algorithm.foresees(config):
        return EntropyReading(count, entropy)
    tokens, undecided = known.tokens(), Control(False, 1.0, 1.0, entropy, entropy)  # the choice does not depend on it
    chosen = [w.selection.selected_T for w in weigh(runner, known.data, tokens, undecided, algorithm, config, ages)]
    totals = runner.from_last_stage(dynamics.measure_forces(tokens, torch.cat(chosen), runner.comm))
    return ForcedReading(count, entropy, dynamics.forces(totals.tolist()))


def exact_sets(
    runner: Runner, data: Sequence[RankBatch], scored: Sequence[Scored], config: AlgorithmConfig
) -> list[torch.Tensor]:
    """What selection by exact sensitivity would choose of the whole update batch, bool [T] of each optimizer step; it
    is the choice itself where the weight sets itself. A collective of the last pipeline stage."""
    tokens = candidates(data, scored)
    if config.method == "stare" and config.stare.weight == "auto":
        whole_T = raising(tokens)
    else:
        whole_T = dynamics.exact_set(tokens, config.stare.fraction, runner.comm)
    return list(whole_T.split([d.batch.token_ids_T.shape[0] for d in data]))


def entropy_dynamics(
    runner: Runner, data: RankBatch, scored: Scored, applied: dynamics.Applied, exact_T: torch.Tensor
) -> tuple[Measured, ...]:
    """What an optimizer step is expected to do to the entropy; equal on every rank. A collective."""
    tokens = candidates([data], [scored])
    return dynamics.from_totals(
        runner.from_last_stage(dynamics.measure(tokens, applied, exact_T, runner.comm)).tolist()
    )


@dataclass(frozen=True, eq=False)
class ForwardBackwardResult(Measurements):
    """What a forward-backward pass saw: what it measured over all ranks, the weights it used, and the `Scored` that its
    ratios are taken from: the scoring pass's or, where there was none, its own."""

    applied: dynamics.Applied
    scored: Scored


def token_records(
    data: Sequence[RankBatch], passes: Sequence[ForwardBackwardResult], first_tokens: Collection[int]
) -> dict[int, TokenRecord]:
    """What this rank (last stage) knows of the sequences that begin at these global token ids, by them."""
    found = {}
    for loaded, seen in zip(data, passes, strict=True):
        batch, scores = loaded.batch, seen.scored.scores
        bounds = batch.cu_seqlens_N1.tolist()
        for n, first in enumerate(batch.global_sequence_N.tolist()):
            if first not in first_tokens:
                continue
            here = slice(bounds[n], bounds[n + 1])
            known_T = loaded.owned_T[here]

            def own(x_T: torch.Tensor, here: slice = here, known_T: torch.Tensor = known_T) -> npt.NDArray[np.float32]:
                return torch.where(known_T, x_T[here], 0.0).float().cpu().numpy()

            found[first] = TokenRecord(
                known=known_T.cpu().numpy(),
                logprob=own(scores.logprob_T),
                raw_logprob=own(seen.scored.raw_logprob_T),
                entropy=own(scores.entropy_T),
                advantage=own(batch.advantage_T),
                weight=own(seen.applied.weight_T),
                selected=(known_T & seen.applied.selected_T[here]).cpu().numpy(),
            )
    return found


@dataclass(frozen=True, eq=False)
class _Known:
    """Of the tokens of a micro-batch, [R], without gradient: the policy of the ratio's denominator."""

    logprob_R: torch.Tensor
    raw_logprob_R: torch.Tensor
    sensitivity_R: torch.Tensor


def forward_backward(
    runner: Runner,
    data: RankBatch,
    scored: Scored | None,
    weights: Weights | None,
    control: Control,
    algorithm: Algorithm,
    config: AlgorithmConfig,
    temperature: float,
) -> ForwardBackwardResult:
    """Accumulate the gradient of one optimizer step in the chunks' gradient buffers. A collective.

    `scored` None: there was no scoring pass. The weights are then still those that sampled, so that this pass is one:
    every ratio is exactly 1, at the trainer's own log-prob. Needs temperature 1.

    `weights` None: weigh each micro-batch by itself, under the weights being updated (`scope = "microbatch"`, which is
    what the reference does; its result depends on packing and on the number of ranks).
    """
    batch = data.batch
    tally = Tally(runner.place)
    if weights is None:
        used = dynamics.Applied(torch.ones_like(batch.advantage_T), torch.zeros_like(batch.action_T))
    else:
        used = dynamics.Applied(weights.weight_T, weights.selection.selected_T)
    sequences = batch.global_sequence_N.shape[0]
    own_T3 = torch.zeros((batch.token_ids_T.shape[0], 3), device=runner.place)  # log-prob, entropy, S of this pass

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> torch.Tensor:
        kept_R = row.source_R >= 0
        source_R = row.source_R[kept_R]
        found = runner.head.log_probs(
            hidden_RH,
            row.target_R,
            temperature=temperature,
            entropy_gradient=algorithm.entropy_gradient,
            sensitivity=scored is None,
        )
        logprob_R, entropy_R, sensitivity_R = (x_R[kept_R] for x_R in found)
        if scored is None:
            own_T3[source_R] = torch.stack([logprob_R.detach(), entropy_R.detach(), sensitivity_R], 1)
            known = _Known(logprob_R.detach(), logprob_R.detach(), sensitivity_R)
        else:
            policy = scored.scores
            known = _Known(policy.logprob_T[source_R], scored.raw_logprob_T[source_R], policy.sensitivity_T[source_R])
        actions = Sequences(batch.sequence_T[source_R], sequences, runner.context_comm)
        correction = correct(known.raw_logprob_R, batch.rollout_logprob_T[source_R], actions, config.correction)
        if weights is None:
            here = _micro_batch_candidates(batch, source_R, logprob_R.detach(), entropy_R.detach(), known.sensitivity_R)
            local = algorithm.weigh(here, control, config, runner.context_comm)
            used.weight_T[source_R], used.selected_T[source_R] = local.weight_T, local.selection.selected_T
            subset_R = local.subset_T
        else:
            subset_R = weights.subset_T[source_R]
        tokens = LossInputs(
            logprob_T=logprob_R,
            old_logprob_T=known.logprob_R,
            entropy_T=entropy_R,
            advantage_T=batch.advantage_T[source_R],
            weight_T=used.weight_T[source_R],
            selected_T=used.selected_T[source_R],
            correction_T=correction.factor_T,
            sequences=actions,
            control=control,
        )
        token_loss = algorithm.loss(tokens, config)
        if isinstance(data, ReferencedBatch):
            token_loss = with_kl(token_loss, logprob_R, known.logprob_R, data.reference_logprob_T[source_R], config.kl)
        loss = (data.factor_T[source_R] * token_loss.loss_T).sum()
        tally.add(_reports(loss, token_loss, tokens, subset_R, correction))
        return loss

    runner.run(data.rows, consume, train=True)
    logprob_T, entropy_T, sensitivity_T = own_T3.t().contiguous()
    own = Scored(Scores(logprob_T, entropy_T, sensitivity_T), logprob_T)
    return ForwardBackwardResult(tally.measured(runner), used, own if scored is None else scored)


def _reports(
    loss: torch.Tensor, of: TokenLoss, tokens: LossInputs, subset_T: torch.Tensor, correction: Correction
) -> dict[str, Reported]:
    """What a micro-batch adds to the metrics of its optimizer step."""
    positive_T, negative_T = subset_T == POSITIVE, subset_T == NEGATIVE
    return {
        "update/loss": Reported(loss, "sum"),
        "update/clip_fraction": Reported(of.clipped_T),
        "update/ratio_max": Reported(of.ratio_T, "max"),
        "update/kl": Reported(kl_estimate(tokens.logprob_T.detach(), tokens.old_logprob_T)),
        "stare/selected_pos": Reported(tokens.selected_T & positive_T, "count"),
        "stare/selected_neg": Reported(tokens.selected_T & negative_T, "count"),
        "stare/tokens_pos": Reported(positive_T, "count"),
        "stare/tokens_neg": Reported(negative_T, "count"),
        "correction/mean": Reported(correction.factor_T),
        "correction/bounded": Reported(correction.bounded_T),
        **of.metrics,
    }


def _micro_batch_candidates(
    batch: TokenBatch,
    source_R: torch.Tensor,
    logprob_R: torch.Tensor,
    entropy_R: torch.Tensor,
    sensitivity_R: torch.Tensor,
) -> ScoredCandidates:
    return ScoredCandidates(
        surprisal_T=-logprob_R,
        advantage_T=batch.advantage_T[source_R],
        action_T=torch.ones_like(source_R, dtype=torch.bool),
        global_id_T=batch.global_id_T[source_R],
        entropy_T=entropy_R,
        sensitivity_T=sensitivity_R,
    )
