"""Forward and backward over packed micro-batches through Megatron-Core's schedules, and what is summed up of them.

Every sum over tokens is a plain sum over micro-batches and ranks: the loss is divided beforehand by ONE global
denominator (`algo.reduce`), entropies are added as int64 fixed point. So micro-batch budgets, packing, DP, CP and PP do
not change the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from stare_megatron.algo import dynamics
from stare_megatron.algo.correction import Correction, correct
from stare_megatron.algo.losses.types import LossInputs, Sequences
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point, token_factors
from stare_megatron.algo.registry import Algorithm
from stare_megatron.algo.selection import NEGATIVE, POSITIVE
from stare_megatron.algo.shards import Shards
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.algo.surrogate import importance_ratio, kl_estimate
from stare_megatron.config import AlgorithmConfig
from stare_megatron.dynamics import Dynamics
from stare_megatron.errors import RunError
from stare_megatron.trainer.head import Head
from stare_megatron.trainer.sequence import MicroBatch
from stare_megatron.types import Control, Scores, ScoreSummary, TokenBatch

# Bounds of one token's term of a mean, so that a sum in fixed point cannot overflow.
MAX_KL_TERM = 2.0**15  # nats
MAX_RATIO_TERM = 2.0**7  # of trainer to engine; its square is summed too


@dataclass(frozen=True, eq=False)
class Loaded:
    """One optimizer step's data on a rank.

    `owned_T` bool: action tokens whose prediction this context-parallel rank makes; over the data- and
    context-parallel ranks each action token of the step is owned once. `factor_T` float32: weight of a token's loss in
    the plain sum (`algo.reduce`).
    """

    batch: TokenBatch
    rows: list[MicroBatch]
    owned_T: torch.Tensor
    factor_T: torch.Tensor


def loaded(batch: TokenBatch, rows: list[MicroBatch], config: AlgorithmConfig) -> Loaded:
    owned_T = torch.zeros_like(batch.action_T)
    for row in rows:
        owned_T[row.source_P[row.source_P >= 0]] = True
    actions_N = torch.zeros(batch.global_sequence_N.shape[0], device=owned_T.device)
    actions_N.index_add_(0, batch.sequence_T, batch.action_T.float())
    factor_T = token_factors(
        config.reduction,
        actions_N[batch.sequence_T],
        num_action_tokens=batch.num_action_tokens,
        num_sequences=batch.num_sequences,
        constant_length=config.response_tokens,
    )
    return Loaded(batch, rows, owned_T, factor_T)


@dataclass(frozen=True, eq=False)
class Runner:
    """How this rank runs its model: chunks, the output layer (of the last stage), and who shares what.

    `shards`: the data- x context-parallel ranks; `context_shards`: the context-parallel ones. `pipeline`: the pipeline
    group, `last_stage`: global rank of its last stage.
    """

    chunks: Sequence[torch.nn.Module]
    head: Head
    shards: Shards
    context_shards: Shards
    pipeline: dist.ProcessGroup
    last_stage: int
    is_last_stage: bool
    place: torch.device

    def run(
        self, rows: Sequence[MicroBatch], consume: Callable[[torch.Tensor, MicroBatch], Any], *, train: bool
    ) -> None:
        """One pass over the micro-batches. `consume(hidden [R, H], row)` is called on the last stage, with the
        hidden states of `row.head_R`.

        Training, it returns the loss to go backward from (already divided by everything); otherwise nothing.
        """

        def forward(rows_left: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            row: MicroBatch = next(rows_left)
            output = chunk(
                input_ids=row.token_ids_1P,
                position_ids=row.position_ids_1P,
                attention_mask=None,
                packed_seq_params=_packed(row),
                rows_R=row.head_R,
            )
            return output, functools.partial(_train if train else _score, row)

        def _train(row: MicroBatch, hidden_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            # The number of tokens is not used: see trainer.model.PolicyConfig.
            tokens = torch.zeros((), dtype=torch.int, device=hidden_RH.device)
            return consume(hidden_RH, row), tokens, {}

        def _score(row: MicroBatch, hidden_RH: torch.Tensor, non_loss_data: bool) -> None:
            consume(hidden_RH, row)

        schedule = get_forward_backward_func()
        with torch.set_grad_enabled(train):
            schedule(
                forward_step_func=forward,
                data_iterator=[iter(rows) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=len(rows),
                seq_length=max(row.token_ids_1P.shape[1] for row in rows),
                micro_batch_size=1,
                forward_only=not train,
                collect_non_loss_data=not train,
            )

    def from_last_stage(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as the last pipeline stage has it, on every stage; in place."""
        if dist.get_world_size(self.pipeline) > 1:
            dist.broadcast(x, src=self.last_stage, group=self.pipeline)
        return x


def _packed(row: MicroBatch) -> PackedSeqParams:
    """As attention wants it. Padding counts as tokens of its sequence: it comes last, so causality hides it."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=row.cu_seqlens_M1,
        cu_seqlens_kv=row.cu_seqlens_M1,
        max_seqlen_q=row.max_seqlen,
        max_seqlen_kv=row.max_seqlen,
    )


@dataclass(frozen=True, eq=False)
class Scored:
    """`scores` at the rollout temperature; `raw_logprob_T` float32 at temperature 1, which is the convention of the
    engines' recorded log-probs. Zeros on all but the last pipeline stage."""

    scores: Scores
    raw_logprob_T: torch.Tensor


def score(runner: Runner, data: Loaded, temperature: float) -> Scored:
    """Log-prob and entropy of every owned token under the present weights; no graph."""
    value_T4 = torch.zeros((data.batch.token_ids_T.shape[0], 4), device=runner.place)

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> None:
        got = runner.head.token_scores(hidden_RH, row.target_R, temperature=temperature)
        kept_R = row.source_R >= 0
        columns = torch.stack([got.logprob_T, got.entropy_T, got.sensitivity_T, got.raw_logprob_T], 1)
        value_T4[row.source_R[kept_R]] = columns[kept_R]

    runner.run(data.rows, consume, train=False)
    logprob_T, entropy_T, sensitivity_T, raw_T = value_T4.t().contiguous()
    return Scored(Scores(logprob_T, entropy_T, sensitivity_T), raw_T)


def summarize(runner: Runner, data: Sequence[Loaded], scored: Sequence[Scored]) -> ScoreSummary:
    """Means over all action tokens of the update batch: exact sums, the same bits for every layout. A collective.

    Raises:
        RunError: a log-prob or entropy is not finite; on every rank.
    """
    pairs = list(zip(data, scored, strict=True))
    entropy_T = torch.cat([s.scores.entropy_T[d.owned_T] for d, s in pairs])
    logprob_T = torch.cat([s.scores.logprob_T[d.owned_T] for d, s in pairs])
    raw_T = torch.cat([s.raw_logprob_T[d.owned_T] for d, s in pairs])
    engine_T = torch.cat([d.batch.rollout_logprob_T[d.owned_T] for d, _ in pairs])
    gap_T = (raw_T - engine_T).abs()
    kl_T = kl_estimate(raw_T, engine_T).clamp(max=MAX_KL_TERM)
    ratio_T = torch.exp((raw_T - engine_T).double()).clamp(max=MAX_RATIO_TERM)
    summed = (entropy_T, -logprob_T, gap_T, kl_T, ratio_T, ratio_T**2)
    sums = torch.stack([fixed_point_sum(x_T) for x_T in summed])
    totals = torch.cat([sums.flatten(), sums.new_tensor([entropy_T.shape[0]])])
    worst = gap_T.new_zeros(2, dtype=torch.float64)  # largest |log ratio|, largest ratio
    if gap_T.numel():
        worst = torch.stack([gap_T.double().amax(), importance_ratio(raw_T.double(), engine_T.double()).amax()])
    if runner.is_last_stage:
        totals, worst = runner.shards.sum(totals), runner.shards.max(worst)
    *flat, tokens = runner.from_last_stage(totals).tolist()
    values, broken = flat[0::2], flat[1::2]
    mismatch_max, ratio_max = runner.from_last_stage(worst).tolist()
    if any(broken):
        raise RunError(
            f"scoring pass: of {tokens} action tokens, {broken[0]} have a non-finite entropy, {broken[1]} a non-finite "
            f"log-prob under the policy, {broken[2]} one under the policy or the engine"
        )
    entropy, surprisal, mismatch, kl, ratio, square = (from_fixed_point(v) / tokens for v in values)
    ess = ratio**2 / square if square else 0.0  # 0: every ratio is below 2^-12
    return ScoreSummary(tokens, entropy, surprisal, mismatch, mismatch_max, kl, ratio_max, ess)


def weigh(
    runner: Runner,
    data: Sequence[Loaded],
    scored: Sequence[Scored],
    control: Control,
    algorithm: Algorithm,
    config: AlgorithmConfig,
) -> list[Weights]:
    """Token weights of all optimizer steps, selected ONCE over the whole update batch of all data- and
    context-parallel ranks, from the scoring pass's surprisal. A collective of the last pipeline stage.

    (The reference re-selects for every mini-batch under the weights of that moment.)
    """
    sizes = [d.batch.token_ids_T.shape[0] for d in data]
    whole = algorithm.weigh(_candidates(data, scored), control, config, runner.shards)
    return [
        Weights(weight_T, subset_T, selection)
        for weight_T, subset_T, selection in zip(
            whole.weight_T.split(sizes), whole.subset_T.split(sizes), whole.selection.split(sizes), strict=True
        )
    ]


def _candidates(data: Sequence[Loaded], scored: Sequence[Scored]) -> Candidates:
    """The tokens of some optimizer steps on this rank, end to end."""
    return Candidates(
        surprisal_T=torch.cat([-s.scores.logprob_T for s in scored]),
        entropy_T=torch.cat([s.scores.entropy_T for s in scored]),
        sensitivity_T=torch.cat([s.scores.sensitivity_T for s in scored]),
        advantage_T=torch.cat([d.batch.advantage_T for d in data]),
        action_T=torch.cat([d.owned_T for d in data]),
        global_id_T=torch.cat([d.batch.global_id_T for d in data]),
    )


def exact_sets(
    runner: Runner, data: Sequence[Loaded], scored: Sequence[Scored], config: AlgorithmConfig
) -> list[torch.Tensor]:
    """What selection by exact sensitivity would choose of the whole update batch, bool [T] of each optimizer step. A
    collective of the last pipeline stage."""
    whole_T = dynamics.exact_set(_candidates(data, scored), config.stare.fraction, runner.shards)
    return list(whole_T.split([d.batch.token_ids_T.shape[0] for d in data]))


def entropy_dynamics(
    runner: Runner, data: Loaded, scored: Scored, applied: dynamics.Applied, exact_T: torch.Tensor
) -> Dynamics:
    """What an optimizer step is expected to do to the entropy; equal on every rank. A collective."""
    tokens = _candidates([data], [scored])
    return dynamics.from_totals(
        runner.from_last_stage(dynamics.measure(tokens, applied, exact_T, runner.shards)).tolist()
    )


@dataclass(frozen=True)
class LossStats:
    """What an optimizer step's forward-backward saw, over all ranks; see `types.UpdateStats`."""

    loss: float
    clip_fraction: float
    ratio_max: float
    kl: float
    selected_pos: int
    selected_neg: int
    num_pos: int
    num_neg: int
    correction_mean: float
    correction_bounded: float


class _Tally:
    """Sums of a pass on this rank: float64 [5] (loss, clipped, kl, correction, bounded by it), largest ratio, counts
    int64 [4]."""

    def __init__(self, place: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=place)
        self.ratio_max = torch.zeros(1, dtype=torch.float64, device=place)
        self.counts = torch.zeros(4, dtype=torch.float64, device=place)  # exact up to 2^53

    def add(self, loss: torch.Tensor, clipped_T: torch.Tensor, kl_T: torch.Tensor, ratio_T: torch.Tensor) -> None:
        self.sums[:3] += torch.stack([loss.detach().double(), clipped_T.sum().double(), kl_T.double().sum()])
        if ratio_T.numel():
            self.ratio_max = torch.maximum(self.ratio_max, ratio_T.double().amax(0, keepdim=True))

    def correct(self, correction: Correction) -> None:
        self.sums[3:] += torch.stack([correction.factor_T.double().sum(), correction.bounded_T.sum().double()])

    def count(self, weights: Weights, selected_T: torch.Tensor) -> None:
        subsets = [weights.subset_T == code for code in (POSITIVE, NEGATIVE)]
        self.counts += torch.stack([(s & selected_T).sum() for s in subsets] + [s.sum() for s in subsets]).double()

    def total(self, runner: Runner, num_action_tokens: int) -> LossStats:
        if runner.is_last_stage:
            runner.shards.sum(self.sums)
            runner.shards.sum(self.counts)
            runner.shards.max(self.ratio_max)
        everything = runner.from_last_stage(torch.cat([self.sums, self.ratio_max, self.counts])).tolist()
        loss, ratio_max, chosen = everything[0], everything[5], [int(n) for n in everything[6:]]
        clipped, kl, correction, bounded = (x / num_action_tokens for x in everything[1:5])
        return LossStats(loss, clipped, ratio_max, kl, *chosen, correction, bounded)


def forward_backward(
    runner: Runner,
    data: Loaded,
    scored: Scored,
    weights: Weights | None,
    control: Control,
    algorithm: Algorithm,
    config: AlgorithmConfig,
    temperature: float,
) -> tuple[LossStats, dynamics.Applied]:
    """Accumulate the gradient of one optimizer step in the chunks' gradient buffers. A collective.

    Returns what was seen, and the weights that were used.

    `weights` None: weigh each micro-batch by itself, under the weights being updated (`scope = "microbatch"`, which is
    what the reference does; its result depends on packing and on the number of ranks).
    """
    batch = data.batch
    tally = _Tally(runner.place)
    if weights is None:
        used = dynamics.Applied(torch.ones_like(batch.advantage_T), torch.zeros_like(batch.action_T))
    else:
        used = dynamics.Applied(weights.weight_T, weights.selection.selected_T)
    sequences = batch.global_sequence_N.shape[0]
    owned = Sequences(batch.sequence_T[data.owned_T], sequences, runner.context_shards)
    raw_T, engine_T = scored.raw_logprob_T[data.owned_T], batch.rollout_logprob_T[data.owned_T]
    correction = correct(raw_T, engine_T, owned, config.correction)
    tally.correct(correction)
    correction_T = torch.ones_like(scored.raw_logprob_T).masked_scatter(data.owned_T, correction.factor_T)

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> torch.Tensor:
        logprob_R, entropy_R = runner.head.log_probs(
            hidden_RH, row.target_R, temperature=temperature, entropy_gradient=algorithm.entropy_gradient
        )
        kept_R = row.source_R >= 0
        logprob_R, entropy_R, source_R = logprob_R[kept_R], entropy_R[kept_R], row.source_R[kept_R]
        advantage_R, old_R = batch.advantage_T[source_R], scored.scores.logprob_T[source_R]
        if weights is None:
            actions_R = torch.ones_like(source_R, dtype=torch.bool)
            ids_R = batch.global_id_T[source_R]
            # S is the scoring pass's: with one update a batch that is the policy being updated.
            sensitivity_R = scored.scores.sensitivity_T[source_R]
            own = Candidates(-logprob_R.detach(), entropy_R.detach(), sensitivity_R, advantage_R, actions_R, ids_R)
            local = algorithm.weigh(own, control, config, runner.context_shards)
            tally.count(local, local.selection.selected_T)
            weight_R, selected_R = local.weight_T, local.selection.selected_T
            used.weight_T[source_R], used.selected_T[source_R] = weight_R, selected_R
        else:
            weight_R, selected_R = weights.weight_T[source_R], weights.selection.selected_T[source_R]
        tokens = LossInputs(
            logprob_T=logprob_R,
            old_logprob_T=old_R,
            entropy_T=entropy_R,
            advantage_T=advantage_R,
            weight_T=weight_R,
            selected_T=selected_R,
            correction_T=correction_T[source_R],
            sequences=Sequences(batch.sequence_T[source_R], sequences, runner.context_shards),
            control=control,
        )
        token_loss = algorithm.loss(tokens, config)
        loss = (data.factor_T[source_R] * token_loss.loss_T).sum()
        tally.add(loss, token_loss.clipped_T, kl_estimate(logprob_R.detach(), old_R), token_loss.ratio_T)
        return loss

    runner.run(data.rows, consume, train=True)
    if weights is not None:
        tally.count(weights, weights.selection.selected_T)
    return tally.total(runner, batch.num_action_tokens), used
