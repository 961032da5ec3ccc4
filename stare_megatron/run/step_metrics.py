"""One finished step as the metrics of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.host.memory import HostMemory
from stare_megatron.metrics.catalogue import Metric, member, metrics
from stare_megatron.rollout.collect import Collected, CollectStats, SourceStats
from stare_megatron.types import Control, GateDuty, Observed, ScoreSummary, UpdateStats


@dataclass(frozen=True)
class StepCosts:
    """What a step took. `seconds`: by phase; `step_seconds`: without the evaluation after the step before; peaks in
    bytes; `trained_total`: action tokens of all steps so far."""

    seconds: Mapping[str, float]
    step_seconds: float
    elapsed: float
    trainer_peak: int
    engine_peak: int
    driver_peak: int
    host: HostMemory
    trained_total: int


QUADRANTS = ("pos_likely", "pos_unlikely", "neg_likely", "neg_unlikely")  # in the order of types.Dynamics


def observed(scores: ScoreSummary, updates: Sequence[UpdateStats]) -> Observed:
    """What the next step is compared with."""
    tokens = sum(u.dynamics.num_tokens for u in updates)
    return Observed(scores.entropy, sum(sum(u.dynamics.change) for u in updates) / tokens)


def dynamics_metrics(scores: ScoreSummary, updates: Sequence[UpdateStats], before: Observed) -> dict[str, float]:
    """The `dynamics/` part of `step_metrics`. `before`: the step before this one."""
    seen = [u.dynamics for u in updates]
    tokens = sum(d.num_tokens for d in seen)
    either = sum(d.union for d in seen)
    values = {
        "dynamics/predicted_change": observed(scores, updates).predicted,
        "dynamics/predicted_change_unweighted": sum(d.unweighted_change for d in seen) / tokens,
        "dynamics/predicted_change_before": before.predicted,
        "dynamics/measured_change": scores.entropy - before.entropy,
        "dynamics/critical_surprisal": sum(d.critical_surprisal for d in seen) / tokens,
        "dynamics/overlap": sum(d.intersection for d in seen) / either if either else math.nan,
        "dynamics/non_finite": sum(d.non_finite for d in seen),
    }
    for kind in ("tokens", "advantage", "change"):
        sums = [sum(column) for column in zip(*(d.__dict__[kind] for d in seen), strict=True)]
        whole = sum(abs(x) for x in sums)
        values |= {f"dynamics/{kind}_{q}": x / whole if whole else 0.0 for q, x in zip(QUADRANTS, sums, strict=True)}
    return values


def sampling_metrics(stats: CollectStats) -> dict[str, float]:
    """What was sampled for a step, dropped groups included."""
    return {
        "reward/mean": stats.reward_mean,
        "reward/correct": stats.correct_fraction,
        "groups/sampled": stats.groups_sampled,
        "groups/all_correct": stats.all_correct,
        "groups/none_correct": stats.none_correct,
        "groups/all_correct_ratio": stats.all_correct / stats.groups_sampled,
        "groups/none_correct_ratio": stats.none_correct / stats.groups_sampled,
        "groups/dropped": stats.zero_variance_dropped,
        "groups/refills": stats.generation_batches - 1,
        "response/length_mean": stats.length_mean,
        "response/length_max": stats.length_max,
        "response/truncated": stats.truncated_fraction,
        "response/failed": stats.failed,
        "response/ungraded": stats.ungraded,
        "response/inexact": stats.inexact,
        "response/reflections": stats.reflections_mean,
        "tools/turns": stats.tools.turns,
        "tools/calls": stats.tools.calls,
        "tools/call_errors": stats.tools.call_errors,
        "tools/seconds": stats.tools.seconds,
        "tools/seconds_max": stats.tools.seconds_max,
        "tools/observation_tokens": stats.tools.observation_tokens,
        "tools/void": stats.tools.void,
    }


def source_metrics(by_source: Mapping[str, SourceStats], labels: Mapping[str, str]) -> dict[str, float]:
    """Reward and accuracy of each label among the sources that were sampled."""
    values: dict[str, float] = {}
    for label in dict.fromkeys(labels[source] for source in by_source):
        parts = [stats for source, stats in by_source.items() if labels[source] == label]
        count = sum(p.trajectories for p in parts)
        reward = sum(p.reward_mean * p.trajectories for p in parts) / count
        correct = sum(p.correct_fraction * p.trajectories for p in parts) / count
        values[member("source/{source}/reward", source=label)] = reward
        values[member("source/{source}/correct", source=label)] = correct
    return values


def step_metrics(
    version: int,
    batch: Collected,
    scores: ScoreSummary,
    control: Control,
    updates: Sequence[UpdateStats],
    probe: float,
    costs: StepCosts,
    epoch: int,
    before: Observed,
    duty: GateDuty,
    labels: Mapping[str, str],
) -> tuple[Metric, ...]:
    """Metrics of the step that made policy `version`. `probe` is NaN when the push was not probed;
    `before`: of the step before; `duty`: this step included; `labels`: of the sources of the prompts."""
    stats = batch.stats
    kept = [summary for _, summary in batch.groups]
    rewards = [reward for summary in kept for reward in summary.rewards]
    staleness = max(version - 1 - v for summary in kept for v in summary.weight_versions)
    count = len(updates)
    values: dict[str, float] = {
        "reward/kept_mean": sum(rewards) / len(rewards),
        "groups/zero_variance_kept": sum(summary.zero_variance for summary in kept),
        "data/epoch": epoch,
        "policy/entropy": scores.entropy,
        "policy/entropy_estimate": scores.rollout_surprisal,
        "policy/entropy_estimate_error": scores.rollout_surprisal - scores.entropy,
        "policy/target_entropy": control.target,
        "policy/surprisal": scores.surprisal,
        "stare/gate": float(control.gate_on),
        "stare/gate_duty": duty.opened / duty.steps,
        "stare/weight_pos": control.weight_pos if control.gate_on else 1.0,
        "stare/weight_neg": control.weight_neg if control.gate_on else 1.0,
        "stare/selected_pos": sum(u.selected_pos for u in updates),
        "stare/selected_neg": sum(u.selected_neg for u in updates),
        "stare/tokens_pos": sum(u.num_pos for u in updates),
        "stare/tokens_neg": sum(u.num_neg for u in updates),
        "update/loss": sum(u.loss for u in updates) / count,
        "update/grad_norm": sum(u.grad_norm for u in updates) / count,
        "update/lr": updates[-1].learning_rate,
        "update/clip_fraction": sum(u.clip_fraction for u in updates) / count,
        "update/ratio_max": max(u.ratio_max for u in updates),
        "update/kl": sum(u.kl for u in updates) / count,
        "mismatch/mean": scores.mismatch.mean,
        "mismatch/max": scores.mismatch.max,
        "mismatch/kl": scores.mismatch.kl,
        "mismatch/ratio_max": scores.mismatch.ratio_max,
        "mismatch/ess": scores.mismatch.ess,
        "mismatch/sequence_ratio_max": scores.mismatch.sequence_ratio_max,
        "mismatch/sequence_ess": scores.mismatch.sequence_ess,
        "correction/mean": sum(u.correction_mean for u in updates) / count,
        "correction/bounded": sum(u.correction_bounded for u in updates) / count,
        "policy/entropy_coefficient": control.entropy_coefficient,
        "sync/probe": probe,
        "sync/weight_version": version,
        "sync/staleness": staleness,
        "throughput/tokens_per_second": stats.tokens_sampled / costs.step_seconds,
        "throughput/rollout_tokens_per_second": stats.tokens_sampled / costs.seconds["rollout"],
        "throughput/trained_tokens": scores.num_action_tokens,
        "throughput/trained_tokens_total": costs.trained_total,
        "time/step": costs.step_seconds,
        "time/elapsed": costs.elapsed,
        "memory/trainer_peak": costs.trainer_peak / 2**20,
        "memory/engine_peak": costs.engine_peak / 2**20,
        "memory/driver_peak": costs.driver_peak / 2**20,
        "memory/host_run": costs.host.run / 2**20,
        "memory/host_available": costs.host.available / 2**20,
    }
    values |= dynamics_metrics(scores, updates, before)
    values |= sampling_metrics(stats) | source_metrics(stats.by_source, labels)
    for name in ("rollout", "score", "update", "push", "save", "eval"):
        values[f"time/{name}"] = costs.seconds.get(name, 0.0)
    return metrics(values)
