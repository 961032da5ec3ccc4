"""What is known of the tokens of a batch before its update: from a scoring pass, or from the rollout alone.

`trainer.scoring = "trainer"`: a forward pass gives log-prob, entropy and sensitivity of every token (`ScoredBatch`).
`"rollout"`: the engines' log-probs stand for the policy's (`SampledBatch`); entropy, sensitivity and mismatch are then
measured by the update pass, whose forward runs under the same weights (docs/scoring.md).

Sums over tokens are int64 fixed point, so they are the same bits for every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stare_megatron.algo.comm import Comm
from stare_megatron.algo.reduce import FIXED_POINT_BITS, fixed_point_sum, from_fixed_point
from stare_megatron.algo.stare import Candidates, ScoredCandidates
from stare_megatron.algo.surrogate import importance_ratio, kl_estimate
from stare_megatron.errors import RunError
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.sequence import MicroBatch, SequenceLayout, dummy, probe
from stare_megatron.types import EntropyReading, Measured, Scores, ScoreSummary

# Bounds of one token's term of a mean, so that a sum in fixed point cannot overflow.
MAX_KL_TERM = 2.0**15  # nats
MAX_RATIO_TERM = 2.0**7  # of trainer to engine; its square is summed too


@dataclass(frozen=True, eq=False)
class Scored:
    """`scores` at the rollout temperature; `raw_logprob_T` float32 at temperature 1, which is the convention of the
    engines' recorded log-probs. Zeros on all but the last pipeline stage."""

    scores: Scores
    raw_logprob_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """The optimizer steps of an update batch after the scoring pass; `summary`: over all ranks."""

    data: list[RankBatch]
    scored: list[Scored]
    summary: ScoreSummary

    def tokens(self) -> ScoredCandidates:
        """The tokens of all steps on this rank, end to end."""
        return candidates(self.data, self.scored)


@dataclass(frozen=True, eq=False)
class SampledBatch:
    """An update batch of a single optimizer step, of which only the engines' log-probs are known."""

    data: RankBatch

    def tokens(self) -> Candidates:
        batch = self.data.batch
        return Candidates(-batch.rollout_logprob_T, batch.advantage_T, self.data.owned_T, batch.global_id_T)


def candidates(data: Sequence[RankBatch], scored: Sequence[Scored]) -> ScoredCandidates:
    """The tokens of some optimizer steps on this rank, end to end."""
    return ScoredCandidates(
        surprisal_T=torch.cat([-s.scores.logprob_T for s in scored]),
        advantage_T=torch.cat([d.batch.advantage_T for d in data]),
        action_T=torch.cat([d.owned_T for d in data]),
        global_id_T=torch.cat([d.batch.global_id_T for d in data]),
        entropy_T=torch.cat([s.scores.entropy_T for s in scored]),
        sensitivity_T=torch.cat([s.scores.sensitivity_T for s in scored]),
    )


def score(runner: Runner, data: RankBatch, temperature: float) -> Scored:
    """Log-prob, entropy and sensitivity of every owned token under the present weights; no graph."""
    value_T4 = torch.zeros((data.batch.token_ids_T.shape[0], 4), device=runner.place)

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> None:
        got = runner.head.token_scores(hidden_RH, row.target_R, temperature=temperature)
        kept_R = row.source_R >= 0
        columns = torch.stack([got.logprob_T, got.entropy_T, got.sensitivity_T, got.raw_logprob_T], 1)
        value_T4[row.source_R[kept_R]] = columns[kept_R]

    runner.run(data.rows, consume, train=False)
    logprob_T, entropy_T, sensitivity_T, raw_T = value_T4.t().contiguous()
    return Scored(Scores(logprob_T, entropy_T, sensitivity_T), raw_T)


def score_tokens(
    runner: Runner, token_ids: npt.NDArray[np.int32], layout: SequenceLayout, multiple: int
) -> npt.NDArray[np.float32]:
    """Log-probs of tokens 1.. of one sequence at temperature 1, float32 [n - 1]; equal on every rank.

    `multiple`: of micro-batches, which the interleaved schedule wants to be one of the stages.
    """
    ids_T = torch.from_numpy(token_ids).to(runner.place, torch.int64)
    logprob_T = torch.zeros(ids_T.shape[0], device=runner.place)

    def consume(hidden_RH: torch.Tensor, row: MicroBatch) -> None:
        got_R = runner.head.token_scores(hidden_RH, row.target_R, temperature=1.0).logprob_T
        kept_R = row.source_R >= 0
        logprob_T[row.source_R[kept_R]] = got_R[kept_R]

    rows = [probe(ids_T, layout)] + [dummy(layout, runner.place) for _ in range(multiple - 1)]
    runner.run(rows, consume, train=False)
    runner.context_comm.sum(logprob_T)
    return runner.from_last_stage(logprob_T)[1:].cpu().numpy()


def read_rollout(runner: Runner, batch: SampledBatch) -> EntropyReading:
    """The mean surprisal of the sampled tokens under the engines: an estimate of the entropy. A collective.

    Raises:
        RunError: a log-prob of the engines is not finite; on every rank.
    """
    data = batch.data
    engine_T = data.batch.rollout_logprob_T[data.owned_T]
    totals = torch.cat([fixed_point_sum(-engine_T), data.owned_T.sum()[None]])
    if runner.is_last_stage:
        totals = runner.comm.sum(totals)
    surprisal, broken, tokens = runner.from_last_stage(totals).tolist()
    if broken:
        raise RunError(f"rollout: of {tokens} action tokens, {broken} have a non-finite log-prob under the engine")
    return EntropyReading(tokens, from_fixed_point(surprisal) / tokens)


def summarize(runner: Runner, data: Sequence[RankBatch], scored: Sequence[Scored], *, found_by: str) -> ScoreSummary:
    """Means over all action tokens of the update batch: exact sums, the same bits for every layout. A collective.

    `found_by`: the pass that scored them, for the message.

    Raises:
        RunError: a log-prob or entropy is not finite; on every rank.
    """
    pairs = list(zip(data, scored, strict=True))
    entropy_T = torch.cat([s.scores.entropy_T[d.owned_T] for d, s in pairs])
    logprob_T = torch.cat([s.scores.logprob_T[d.owned_T] for d, s in pairs])
    raw_T = torch.cat([s.raw_logprob_T[d.owned_T] for d, s in pairs])
    engine_T = torch.cat([d.batch.rollout_logprob_T[d.owned_T] for d, _ in pairs])
    sequence_N = torch.cat([_sequence_log_ratios(d, s, runner.context_comm) for d, s in pairs])
    gap_T = (raw_T - engine_T).abs()
    kl_T = kl_estimate(raw_T, engine_T).clamp(max=MAX_KL_TERM)
    ratio_T, ratio_N = (x.double().exp().clamp(max=MAX_RATIO_TERM) for x in (raw_T - engine_T, sequence_N))
    summed = (entropy_T, -logprob_T, gap_T, kl_T, ratio_T, ratio_T**2, -engine_T, ratio_N, ratio_N**2)
    sums = torch.stack([fixed_point_sum(x_T) for x_T in summed])
    totals = torch.cat([sums.flatten(), sums.new_tensor([entropy_T.shape[0], sequence_N.shape[0]])])
    worst = gap_T.new_zeros(3, dtype=torch.float64)  # largest |log ratio|, largest ratio, and that of a sequence
    if gap_T.numel():
        worst[:2] = torch.stack([gap_T.double().amax(), importance_ratio(raw_T.double(), engine_T.double()).amax()])
    if sequence_N.numel():
        worst[2] = importance_ratio(sequence_N, torch.zeros_like(sequence_N)).amax()
    if runner.is_last_stage:
        totals, worst = runner.comm.sum(totals), runner.comm.max(worst)
    *flat, tokens, sequences = runner.from_last_stage(totals).tolist()
    values, broken = [from_fixed_point(v) for v in flat[0::2]], flat[1::2]
    mismatch_max, ratio_max, sequence_ratio_max = runner.from_last_stage(worst).tolist()
    if any(broken):
        raise RunError(
            f"{found_by}: of {tokens} action tokens, {broken[0]} have a non-finite entropy, {broken[1]} a non-finite "
            f"log-prob under the policy, {broken[2]} one under the policy or the engine"
        )
    entropy, surprisal, gap, kl, ratios, squares, rollout, sequence_ratios, sequence_squares = values
    measured = (
        Measured("policy/entropy", entropy, tokens),
        Measured("policy/entropy_estimate", rollout, tokens),
        Measured("policy/entropy_estimate_error", rollout / tokens - entropy / tokens),
        Measured("policy/surprisal", surprisal, tokens),
        Measured("mismatch/mean", gap, tokens),
        Measured("mismatch/max", mismatch_max),
        Measured("mismatch/kl", kl, tokens),
        Measured("mismatch/ratio_max", ratio_max),
        Measured("mismatch/ess", effective_share(ratios, squares, tokens)),
        Measured("mismatch/sequence_ratio_max", sequence_ratio_max),
        Measured("mismatch/sequence_ess", effective_share(sequence_ratios, sequence_squares, sequences)),
    )
    return ScoreSummary(measured, tokens)


def effective_share(total: float, squares: float, count: int) -> float:
    """(sum w)^2 / (n sum w^2) of n samples with weights w; 0 when all are below the resolution of the sums, 2^-12."""
    return total**2 / (count * squares) if squares else 0.0


def _sequence_log_ratios(data: RankBatch, scored: Scored, context: Comm) -> torch.Tensor:
    """Sum of trainer less engine log-probs of each sequence's action tokens, float64 [sequences counted on this rank].

    Each sequence is counted by the context-parallel rank that owns its first action token. Sums are in fixed point; a
    non-finite term is left out, and reported elsewhere. A collective.
    """
    batch = data.batch
    x_T = torch.where(data.owned_T, (scored.raw_logprob_T - batch.rollout_logprob_T).double(), 0.0)
    x_T = torch.where(x_T.isfinite(), x_T, 0.0).clamp(-MAX_KL_TERM, MAX_KL_TERM)
    count = batch.global_sequence_N.shape[0]
    sum_N = torch.zeros(count, dtype=torch.int64, device=x_T.device)
    sum_N.index_add_(0, batch.sequence_T, (x_T * (1 << FIXED_POINT_BITS)).round().to(torch.int64))
    sum_N = context.sum(sum_N)
    action_T = batch.action_T.nonzero()[:, 0]
    first_N = torch.full_like(sum_N, batch.token_ids_T.shape[0])
    first_N.scatter_reduce_(0, batch.sequence_T[action_T], action_T, "amin")
    return sum_N[data.owned_T[first_N]].double() / (1 << FIXED_POINT_BITS)
