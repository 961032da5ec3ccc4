"""Every metric a run may log: name, unit, reduction, meaning. A name that is not here cannot be logged.

`docs/metrics.md` is this table, written by `tools/make_metric_docs.py`; a test compares them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """How one number came from many: over the samples, tokens, updates or processes of the step."""

    MEAN = "mean"
    TOKEN_MEAN = "mean over action tokens"
    SUM = "sum"
    MAX = "max"
    LAST = "last"
    UPDATE_MEAN = "mean over the step's updates"
    UPDATE_SUM = "sum over the step's updates"
    UPDATE_MAX = "max over the step's updates"
    PROCESS_MAX = "max over processes"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_ENTRIES = (
    Entry("reward/mean", "reward", Reduction.MEAN, "All sampled trajectories, also those of dropped groups."),
    Entry("reward/kept_mean", "reward", Reduction.MEAN, "Trajectories of the update batch."),
    Entry("reward/correct", "share", Reduction.MEAN, "Sampled trajectories whose answer is correct."),
    Entry("groups/sampled", "groups", Reduction.SUM, "Groups sampled for the step, over all refills."),
    Entry("groups/full_solve", "groups", Reduction.SUM, "Sampled groups in which every trajectory is correct."),
    Entry("groups/no_solve", "groups", Reduction.SUM, "Sampled groups in which no trajectory is correct."),
    Entry("groups/dropped", "groups", Reduction.SUM, "Zero-variance groups that dynamic sampling dropped."),
    Entry("groups/zero_variance_kept", "groups", Reduction.SUM, "Zero-variance groups in the update batch."),
    Entry("groups/refills", "count", Reduction.SUM, "Generation batches sampled beyond the first."),
    Entry("response/length_mean", "tokens", Reduction.MEAN, "Action tokens a sampled trajectory."),
    Entry("response/length_max", "tokens", Reduction.MAX, "Action tokens of the longest sampled trajectory."),
    Entry("response/truncated", "share", Reduction.MEAN, "Sampled trajectories ended by the token or turn budget."),
    Entry("response/failed", "trajectories", Reduction.SUM, "Sampled trajectories the engine or environment failed."),
    Entry("data/epoch", "epochs", Reduction.LAST, "Passes over the prompts begun, less one."),
    Entry("policy/entropy", "nats/token", Reduction.TOKEN_MEAN, "Entropy of the policy about to be updated."),
    Entry("policy/target_entropy", "nats/token", Reduction.LAST, "H_tgt in force: the gate opens below it."),
    Entry("policy/surprisal", "nats/token", Reduction.TOKEN_MEAN, "-log pi of the sampled tokens."),
    Entry("stare/gate", "0 or 1", Reduction.LAST, "1: the weights apply: entropy is below its target."),
    Entry("stare/weight_pos", "factor", Reduction.LAST, "W: weight of L+ while the gate is open; 1 when it is shut."),
    Entry("stare/weight_neg", "factor", Reduction.LAST, "M: weight of L- while the gate is open; 1 when it is shut."),
    Entry("stare/selected_pos", "tokens", Reduction.UPDATE_SUM, "Tokens in L+."),
    Entry("stare/selected_neg", "tokens", Reduction.UPDATE_SUM, "Tokens in L-."),
    Entry("stare/tokens_pos", "tokens", Reduction.UPDATE_SUM, "Tokens with a positive advantage (T+)."),
    Entry("stare/tokens_neg", "tokens", Reduction.UPDATE_SUM, "Tokens with a negative advantage (T-)."),
    Entry("update/loss", "loss", Reduction.UPDATE_MEAN, "The objective; on-policy its value is near 0 by design."),
    Entry("update/grad_norm", "norm", Reduction.UPDATE_MEAN, "L2 norm of the gradient before clipping."),
    Entry("update/lr", "1", Reduction.LAST, "Learning rate."),
    Entry("update/clip_fraction", "share", Reduction.UPDATE_MEAN, "Action tokens whose ratio was clipped."),
    Entry("update/ratio_max", "ratio", Reduction.UPDATE_MAX, "Largest ratio of current to scoring policy."),
    Entry("update/kl", "nats/token", Reduction.UPDATE_MEAN, "r - 1 - log r of the current against the scoring policy."),
    Entry("mismatch/mean", "nats/token", Reduction.TOKEN_MEAN, "|trainer - engine| log-prob of sampled tokens."),
    Entry("mismatch/max", "nats/token", Reduction.MAX, "Largest |trainer - engine| log-prob of a sampled token."),
    Entry("mismatch/kl", "nats/token", Reduction.TOKEN_MEAN, "Estimate of KL(engine || trainer) on sampled tokens."),
    Entry("mismatch/ratio_max", "ratio", Reduction.MAX, "Largest trainer / engine probability of a token, up to e^20."),
    Entry(
        "mismatch/ess",
        "share",
        Reduction.TOKEN_MEAN,
        "Effective sample size under the token ratios r (at most 128): (sum r)^2 / (n sum r^2).",
    ),
    Entry("correction/mean", "factor", Reduction.UPDATE_MEAN, "Mean rollout-correction factor; 1 without correction."),
    Entry("correction/bounded", "share", Reduction.UPDATE_MEAN, "Tokens whose factor was truncated or masked."),
    Entry("policy/entropy_coefficient", "1", Reduction.LAST, "Factor of an adaptive entropy bonus; else 0."),
    Entry(
        "dynamics/predicted_change", "nats/token/eta", Reduction.TOKEN_MEAN, "-w A S: first-order change of entropy."
    ),
    Entry("dynamics/predicted_change_unweighted", "nats/token/eta", Reduction.TOKEN_MEAN, "-A S: the same with w = 1."),
    Entry("dynamics/predicted_change_before", "nats/token/eta", Reduction.LAST, "predicted_change of the step before."),
    Entry(
        "dynamics/measured_change",
        "nats/token",
        Reduction.LAST,
        "This step's policy/entropy less that of the step before: what the update of the step before did, on another "
        "batch; NaN at the first step of a start.",
    ),
    Entry("dynamics/critical_surprisal", "nats/token", Reduction.TOKEN_MEAN, "s*: where S changes sign."),
    Entry("dynamics/overlap", "share", Reduction.LAST, "Jaccard: the chosen tokens and the exact-sensitivity ones."),
    Entry("dynamics/non_finite", "terms", Reduction.UPDATE_SUM, "Terms left out of the sums of dynamics/."),
    Entry(
        "dynamics/tokens_pos_likely",
        "share",
        Reduction.SUM,
        "Share of the tokens with A != 0: A > 0, surprisal below the critical one (S > 0).",
    ),
    Entry(
        "dynamics/tokens_pos_unlikely",
        "share",
        Reduction.SUM,
        "Share of the tokens with A != 0: A > 0, above it (S < 0).",
    ),
    Entry("dynamics/tokens_neg_likely", "share", Reduction.SUM, "Share of the tokens with A != 0: A < 0, below it."),
    Entry("dynamics/tokens_neg_unlikely", "share", Reduction.SUM, "Share of the tokens with A != 0: A < 0, above it."),
    Entry(
        "dynamics/advantage_pos_likely",
        "share",
        Reduction.SUM,
        "Share of the sum of |A|: A > 0, surprisal below the critical one (S > 0).",
    ),
    Entry(
        "dynamics/advantage_pos_unlikely", "share", Reduction.SUM, "Share of the sum of |A|: A > 0, above it (S < 0)."
    ),
    Entry("dynamics/advantage_neg_likely", "share", Reduction.SUM, "Share of the sum of |A|: A < 0, below it."),
    Entry("dynamics/advantage_neg_unlikely", "share", Reduction.SUM, "Share of the sum of |A|: A < 0, above it."),
    Entry(
        "dynamics/change_pos_likely",
        "share",
        Reduction.SUM,
        "Signed share of the predicted change: A > 0, surprisal below the critical one (S > 0).",
    ),
    Entry(
        "dynamics/change_pos_unlikely",
        "share",
        Reduction.SUM,
        "Signed share of the predicted change: A > 0, above it (S < 0).",
    ),
    Entry(
        "dynamics/change_neg_likely", "share", Reduction.SUM, "Signed share of the predicted change: A < 0, below it."
    ),
    Entry(
        "dynamics/change_neg_unlikely", "share", Reduction.SUM, "Signed share of the predicted change: A < 0, above it."
    ),
    Entry("sync/probe", "nats/token", Reduction.MEAN, "|trainer - engine| log-prob of the probe after the push."),
    Entry("sync/weight_version", "version", Reduction.LAST, "Policy version in the engines after the push."),
    Entry("sync/staleness", "versions", Reduction.MAX, "Versions a trained trajectory's policy is behind."),
    Entry("throughput/tokens_per_second", "tokens/s", Reduction.LAST, "Action tokens sampled, by time of the step."),
    Entry(
        "throughput/rollout_tokens_per_second", "tokens/s", Reduction.LAST, "Action tokens sampled, by rollout time."
    ),
    Entry("throughput/trained_tokens", "tokens", Reduction.SUM, "Action tokens of the step's update batch."),
    Entry("throughput/trained_tokens_total", "tokens", Reduction.SUM, "Action tokens trained on since step 0."),
    Entry("time/rollout", "s", Reduction.SUM, "Sampling and rewards."),
    Entry("time/score", "s", Reduction.SUM, "Loading the batch and scoring it."),
    Entry("time/update", "s", Reduction.SUM, "Weights, forward, backward, optimizer."),
    Entry("time/push", "s", Reduction.SUM, "Weights to the engines, and the probe."),
    Entry("time/save", "s", Reduction.SUM, "Checkpoint written after the previous step; 0 when none was due."),
    Entry("time/step", "s", Reduction.SUM, "The whole step."),
    Entry("time/elapsed", "s", Reduction.LAST, "Since this start of the run."),
    Entry("memory/trainer_peak", "MB", Reduction.PROCESS_MAX, "Peak memory of a trainer rank: device memory on a GPU."),
    Entry("memory/engine_peak", "MB", Reduction.PROCESS_MAX, "Peak memory of an engine: device memory on a GPU."),
    Entry("memory/driver_peak", "MB", Reduction.LAST, "Peak resident memory of the driver."),
)

CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def entry(name: str) -> Entry:
    """The catalogue's entry.

    Raises:
        ValueError: the name is not in the catalogue; the message names the nearest one.
    """
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.0)
        raise ValueError(f"no metric {name!r} in metrics/catalogue.py; nearest is {near[0]!r}")
    return CATALOGUE[name]


@dataclass(frozen=True)
class Metric:
    """One value of one step, in the catalogue's unit.

    Example:
        Metric("policy/entropy", 0.213, "nats/token")
    """

    name: str
    value: float
    unit: str

    def __post_init__(self) -> None:
        want = entry(self.name).unit
        if self.unit != want:
            raise ValueError(f"metric {self.name}: unit {self.unit!r}, the catalogue says {want!r}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ValueError(f"metric {self.name}: value must be a Python number, got {type(self.value).__name__}")


def metrics(values: Mapping[str, float]) -> tuple[Metric, ...]:
    """Name -> value, with units from the catalogue.

    Raises:
        ValueError: a name is not in the catalogue.
    """
    return tuple(Metric(name, value, entry(name).unit) for name, value in values.items())


def by_name(step_metrics: Iterable[Metric]) -> dict[str, float]:
    """Name -> value.

    Raises:
        ValueError: a name occurs twice.
    """
    found: dict[str, float] = {}
    for m in step_metrics:
        if m.name in found:
            raise ValueError(f"metric {m.name} given twice in one step")
        found[m.name] = m.value
    return found


def markdown() -> str:
    """The catalogue as the page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "One line a step in `metrics.jsonl`, the same names in TensorBoard and Weights & Biases. Written by "
        "`python tools/make_metric_docs.py` from `stare_megatron/metrics/catalogue.py`.",
        "",
        "Step n is what the n-th optimizer step did: its rollout was sampled, and its entropy measured, by version "
        "n - 1 of the policy. In JSON a value that is not finite is the string `NaN`, `Infinity` or `-Infinity`.",
        "",
        "| name | unit | reduction | meaning |",
        "|---|---|---|---|",
    ]
    for e in CATALOGUE.values():
        meaning = e.meaning.replace("|", "\\|")
        lines.append(f"| `{e.name}` | {e.unit} | {e.reduction.value} | {meaning} |")
    return "\n".join(lines) + "\n"
