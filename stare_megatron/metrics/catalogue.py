"""Every metric a run may log: name, unit, reduction, meaning. A name that is not here cannot be logged.

`docs/metrics.md` is this table (`catalogue_page.py`), written by `tools/make_metric_docs.py`; a test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stare_megatron.errors import suggest
from stare_megatron.metrics.entry import Entry, Reduction
from stare_megatron.metrics.families import FAMILY_ENTRIES
from stare_megatron.types import QUADRANTS

R = Reduction


_KINDS = {
    "tokens": "Share of the tokens with A != 0",
    "advantage": "Share of the sum of |A|",
    "change": "Signed share of the predicted change",
}

_PHASES = {"rollout": "sampling", "score": "the scoring pass", "update": "the update, three forward passes' worth"}

_ENTRIES = (
    Entry("reward/mean", "reward", R.MEAN, "All sampled trajectories, also those of dropped groups."),
    Entry("reward/kept_mean", "reward", R.MEAN, "Trajectories of the update batch."),
    Entry("reward/correct", "fraction", R.MEAN, "Sampled trajectories whose answer is correct."),
    Entry("groups/sampled", "groups", R.SUM, "Groups sampled for the step, refills included."),
    Entry("groups/all_correct", "groups", R.SUM, "Sampled groups in which every trajectory is correct."),
    Entry("groups/none_correct", "groups", R.SUM, "Sampled groups in which no trajectory is correct."),
    Entry("groups/all_correct_ratio", "fraction", R.MEAN, "groups/all_correct by groups/sampled."),
    Entry("groups/none_correct_ratio", "fraction", R.MEAN, "groups/none_correct by groups/sampled."),
    Entry("groups/dropped", "groups", R.ONE, "Zero-variance groups that dynamic sampling dropped; each was refilled."),
    Entry("groups/zero_variance_kept", "groups", R.SUM, "Zero-variance groups in the update batch."),
    Entry("response/length_mean", "tokens", R.MEAN, "Action tokens a sampled trajectory."),
    Entry("response/length_max", "tokens", R.MAX, "Action tokens of the longest sampled trajectory."),
    Entry("response/truncated", "fraction", R.MEAN, "Sampled trajectories ended by the token or turn budget."),
    Entry("response/failed", "trajectories", R.SUM, "Sampled trajectories the engine or environment failed."),
    Entry("response/ungraded", "trajectories", R.SUM, "Sampled trajectories without a grade: no loss."),
    Entry("response/inexact", "trajectories", R.SUM, "Sampled trajectories that could not go on exactly: no loss."),
    Entry("tools/turns", "turns", R.MEAN, "Turns of the policy in a sampled trajectory."),
    Entry("tools/calls", "calls", R.MEAN, "Tool calls of a sampled trajectory."),
    Entry("tools/call_errors", "fraction", R.FRACTION, "Calls that cannot be read, or whose code did not end well."),
    Entry("tools/seconds", "s", R.MEAN, "Time in a sampled trajectory's calls, without waiting for a turn."),
    Entry("tools/seconds_max", "s", R.MAX, "That of the sampled trajectory with the most."),
    Entry("tools/observation_tokens", "tokens", R.MEAN, "Tokens of a sampled trajectory the tool wrote: no loss."),
    Entry("tools/void", "fraction", R.MEAN, "Sampled trajectories with a turn without call and final answer."),
    Entry(
        "response/reflections",
        "words/response",
        R.MEAN,
        "Occurrences of `logging.reflection_words` in sampled trajectories.",
    ),
    Entry("data/epoch", "epochs", R.ONE, "Passes over the prompts begun, less one."),
    Entry("policy/entropy", "nats/token", R.TOKEN_MEAN, "Entropy of the policy about to be updated."),
    Entry(
        "policy/entropy_estimate",
        "nats/token",
        R.TOKEN_MEAN,
        "-log pi of the sampled tokens under the engine: at temperature 1 and top-p 1 an estimate of "
        'policy/entropy; with trainer.scoring = "rollout" it decides the gate.',
    ),
    Entry("policy/entropy_estimate_error", "nats/token", R.ONE, "policy/entropy_estimate - policy/entropy."),
    Entry("policy/target_entropy", "nats/token", R.ONE, "H_tgt in force: the gate opens below it."),
    Entry("policy/surprisal", "nats/token", R.TOKEN_MEAN, "-log pi of the sampled tokens."),
    Entry("stare/gate", "0 or 1", R.ONE, "1: the weights apply: entropy is below its target."),
    Entry("stare/gate_duty", "fraction", R.MEAN, "Steps of this run's record so far with an open gate."),
    Entry("stare/weight_pos", "factor", R.ONE, "W: weight of L+ while the gate is open; 1 when it is closed."),
    Entry("stare/weight_neg", "factor", R.ONE, "M: weight of L- while the gate is open; 1 when it is closed."),
    Entry("stare/gain", "factor", R.ONE, 'Measured by expected change of entropy, as `weight = "auto"` learned it.'),
    Entry("stare/selected_pos", "tokens", R.UPDATE_SUM, "Tokens in L+."),
    Entry("stare/selected_neg", "tokens", R.UPDATE_SUM, "Tokens in L-."),
    Entry("stare/tokens_pos", "tokens", R.UPDATE_SUM, "Tokens with a positive advantage (T+)."),
    Entry("stare/tokens_neg", "tokens", R.UPDATE_SUM, "Tokens with a negative advantage (T-)."),
    Entry(
        "update/loss",
        "loss",
        R.UPDATE_MEAN,
        "The objective; on-policy its value is near 0 by design. sft: the cross entropy.",
    ),
    Entry("update/grad_norm", "norm", R.UPDATE_MEAN, "L2 norm of the gradient before clipping."),
    Entry(
        "packing/cost_imbalance",
        "fraction",
        R.UPDATE_MEAN,
        "Costliest data-parallel rank by the mean, less 1, in FLOPs of its sequences; see docs/packing.md.",
    ),
    Entry("packing/largest_tokens", "tokens", R.UPDATE_MAX, "Largest micro-batch: at most trainer.micro_batch_tokens."),
    Entry("update/lr", "1", R.LAST, "Learning rate."),
    Entry("update/loss_scale", "factor", R.LAST, "float16: factor of the loss while its gradients were made."),
    Entry("update/overflows", "updates", R.UPDATE_SUM, "float16: updates skipped since their gradients overflowed."),
    Entry("update/clip_fraction", "fraction", R.UPDATE_MEAN, "Action tokens whose ratio was clipped."),
    Entry("update/ratio_max", "ratio", R.UPDATE_MAX, "Largest ratio of current to scoring policy."),
    Entry("update/kl", "nats/token", R.UPDATE_MEAN, "r - 1 - log r of the current against the scoring policy."),
    Entry("kl/reference", "nats/token", R.UPDATE_MEAN, "k3 of the current policy against the reference: algorithm.kl."),
    Entry("kl/penalty", "1", R.UPDATE_MEAN, "Coefficient x estimate a token: on the loss, or off the reward."),
    Entry("loss/detached", "fraction", R.UPDATE_MEAN, "clip_cov: action tokens without gradient for their covariance."),
    Entry("loss/penalty", "loss", R.UPDATE_MEAN, "kl_cov: mean penalty of the chosen tokens."),
    Entry("mismatch/mean", "nats/token", R.TOKEN_MEAN, "|trainer - engine| log-prob of sampled tokens."),
    Entry("mismatch/max", "nats/token", R.MAX, "Largest |trainer - engine| log-prob of a sampled token."),
    Entry("mismatch/kl", "nats/token", R.TOKEN_MEAN, "Estimate of KL(engine || trainer) on sampled tokens."),
    Entry("mismatch/ratio_max", "ratio", R.MAX, "Largest trainer / engine probability of a token, up to e^20."),
    Entry(
        "mismatch/ess",
        "fraction",
        R.ONE,
        "Effective sample size under the token ratios r (at most 128): (sum r)^2 / (n sum r^2).",
    ),
    Entry(
        "mismatch/sequence_ratio_max",
        "ratio",
        R.MAX,
        "Largest trainer / engine probability of a trajectory's action tokens, up to e^20.",
    ),
    Entry(
        "mismatch/sequence_ess",
        "fraction",
        R.ONE,
        "Effective sample size under the trajectories' ratios (at most 128), as a share of the trajectories.",
    ),
    Entry("correction/mean", "factor", R.UPDATE_MEAN, "Mean rollout-correction factor; 1 without correction."),
    Entry("correction/bounded", "fraction", R.UPDATE_MEAN, "Tokens whose factor was truncated or masked."),
    Entry("policy/entropy_coefficient", "1", R.ONE, "Factor of an adaptive entropy bonus; else 0."),
    Entry("dynamics/predicted_change", "nats/token/eta", R.TOKEN_MEAN, "-w A S: first-order change of entropy."),
    Entry("dynamics/predicted_change_unweighted", "nats/token/eta", R.TOKEN_MEAN, "-A S: the same with w = 1."),
    Entry("dynamics/predicted_change_before", "nats/token/eta", R.ONE, "predicted_change of the step before."),
    Entry(
        "dynamics/measured_change",
        "nats/token",
        R.ONE,
        "This step's policy/entropy less that of the step before: what the update of the step before did, on "
        "another batch; NaN at the first step of a start.",
    ),
    Entry("dynamics/critical_surprisal", "nats/token", R.TOKEN_MEAN, "s*: where S changes sign."),
    Entry("dynamics/overlap", "fraction", R.MEAN, "Jaccard: the chosen tokens and the exact-sensitivity ones."),
    Entry("dynamics/non_finite", "terms", R.UPDATE_SUM, "Terms left out of the sums of dynamics/."),
    *(
        Entry(f"dynamics/{kind}_{quadrant}", "fraction", R.FRACTION, f"{of}: {which}")
        for kind, of in _KINDS.items()
        for quadrant, which in QUADRANTS.items()
    ),
    Entry(
        "sync/probe",
        "nats/token",
        R.MAX,
        "Mean |trainer - engine| log-prob of the probe after the push; the worst engine's.",
    ),
    Entry(
        "sync/compared",
        "fraction",
        R.MEAN,
        "Of the tensors, or parts of them, whose checksums were due after the push, those that engines could tell: of "
        "quantized ones they cannot; NaN when none were due.",
    ),
    Entry("sync/weight_version", "version", R.ONE, "Policy version in the engines after the push."),
    Entry("sync/staleness", "versions", R.MAX, "Versions a trained trajectory's oldest policy is behind."),
    Entry("sync/staleness_mean", "versions", R.TOKEN_MEAN, "Versions that a trained token's policy is behind."),
    Entry("sync/staleness_p95", "versions", R.ONE, "95 % of the trained tokens are at most so far behind."),
    Entry("sync/version_spans", "spans", R.MEAN, "Stretches of one policy in a trained trajectory."),
    Entry("sync/version_spans_max", "spans", R.MAX, "The most, in any of them."),
    Entry("sft/held_out_loss", "nats/token", R.TOKEN_MEAN, "Command `sft`: cross entropy of `data.eval`."),
    Entry("sft/sequences", "sequences", R.ONE, "Command `sft`: of the step's batch."),
    Entry("sft/tokens", "tokens", R.ONE, "Command `sft`: of the step's batch, learned or not."),
    Entry(
        "throughput/tokens_per_second",
        "tokens/s",
        R.MEAN,
        "Action tokens of the groups that finished (sft: all tokens), by time of the step.",
    ),
    Entry("throughput/rollout_tokens_per_second", "tokens/s", R.MEAN, "The same, by sampling time."),
    Entry(
        "throughput/tokens_per_second_per_device",
        "tokens/s",
        R.MEAN,
        "throughput/tokens_per_second by the devices (GPUs; ranks and workers on CPUs) of ranks and engines.",
    ),
    Entry("throughput/trained_tokens", "tokens", R.UPDATE_SUM, "Action tokens of the step's update batch."),
    Entry("throughput/trained_tokens_total", "tokens", R.ONE, "Action tokens trained on since step 0."),
    Entry(
        "throughput/pushed",
        "MB",
        R.SUM,
        "Weights that ranks sent: in shards to each engine, whole tensors once for all of them.",
    ),
    Entry("throughput/saved", "MB", R.SUM, "Files of ranks of the checkpoint finished since the record before."),
    Entry("time/rollout", "s", R.ONE, "Sampling and rewards; waiting for them where the trainer works beside them."),
    Entry("time/score", "s", R.ONE, 'Loading the batch and scoring it; loading alone with scoring = "rollout".'),
    Entry("time/update", "s", R.ONE, "Weights, forward, backward, optimizer."),
    Entry("time/push", "s", R.ONE, "Weights to the engines, and the probe."),
    Entry(
        "time/save", "s", R.ONE, "Checkpoint and export after the previous step, as far as the loop waited for them."
    ),
    Entry("time/eval", "s", R.ONE, "Evaluation after the previous step; 0 when none was due."),
    Entry("time/step", "s", R.ONE, "The whole step, without time/eval."),
    Entry("time/elapsed", "s", R.ONE, "Since this start of the run."),
    *(
        entry
        for phase, what in _PHASES.items()
        for entry in (
            Entry(f"rates/{phase}_tflops", "TFLOP/s", R.MEAN, f"Model operations of {what}, by seconds and devices."),
            Entry(f"rates/{phase}_mfu", "fraction", R.MEAN, "The same by what the GPU can do; NaN if not known."),
        )
    ),
    Entry("rates/push_gbps", "GB/s", R.MEAN, "`throughput/pushed` of all ranks, by the seconds of their sending."),
    Entry(
        "rates/save_gbps",
        "GB/s",
        R.MEAN,
        "`throughput/saved` of all ranks, by the seconds from a save's beginning to its last file; NaN without one.",
    ),
    Entry("idle/engines", "fraction", R.FRACTION, "Of an engine's time in the step, evaluations too: it did nothing."),
    Entry("idle/trainers", "fraction", R.FRACTION, "The same of a trainer rank."),
    Entry(
        "engine/sampling_seconds",
        "s",
        R.ONE,
        "From a batch's first request to its last result; in `stream` since the batch before.",
    ),
    Entry(
        "engine/tail_seconds",
        "s",
        R.ONE,
        "Of a batch's sampling, since nine of ten of its groups were finished; 0 in `stream`, where nothing waits so.",
    ),
    Entry("queue/running", "groups", R.ONE, "`stream`: being sampled when the batch was handed out, others than its."),
    Entry("queue/ready", "groups", R.ONE, "`stream`: finished and in no batch then."),
    Entry("bank/groups", "groups", R.ONE, "`stream`, resumed: finished by the run before, and learned from."),
    Entry("bank/graded", "trajectories", R.ONE, "The same: finished ones of groups that were not."),
    Entry("bank/partial", "trajectories", R.ONE, "The same: continued where the run before had left them."),
    Entry("bank/again", "trajectories", R.ONE, "The same: of outstanding groups, begun again."),
    Entry("engine/requests", "requests", R.MEAN, "Running at once in an engine, over its iterations."),
    Entry("engine/kv_use", "fraction", R.MEAN, "KV cache in use in an engine, over its iterations."),
    Entry("engine/kv_use_max", "fraction", R.MAX, "The most, of any engine."),
    Entry("engine/preemptions", "requests", R.SUM, "Put back for want of KV cache, to be computed again."),
    Entry("engine/draft_acceptance", "fraction", R.FRACTION, "Drafted tokens that were kept (inference.speculative)."),
    Entry("engine/draft_gain", "tokens", R.FRACTION, "Drafted tokens kept at a time: so many passes were spared."),
    Entry("fleet/healthy", "engines", R.ONE, "That could sample when the step was recorded."),
    Entry("fleet/restarts", "count", R.ONE, "Engines started again since the step before."),
    Entry(
        "fleet/groups_again",
        "groups",
        R.SUM,
        "Sampled again, since the engine that had them was lost; of spread ones each part.",
    ),
    Entry(
        "time/offload",
        "s",
        R.PROCESS_MAX,
        "Moving a rank's state to host memory since the record before; part of other phases.",
    ),
    Entry(
        "time/onload", "s", R.PROCESS_MAX, "Moving a rank's state back since the record before; part of other phases."
    ),
    Entry("time/reference", "s", R.PROCESS_MAX, "Passes of the reference, moves included; part of the scoring phase."),
    Entry("memory/trainer_parameters", "MB", R.PROCESS_MAX, "A rank's parameters, wherever they are."),
    Entry("memory/trainer_gradients", "MB", R.PROCESS_MAX, "A rank's gradient buffers on its device in an update."),
    Entry("memory/trainer_optimizer", "MB", R.PROCESS_MAX, "A rank's master weights and moments, wherever they are."),
    Entry(
        "memory/trainer_resident",
        "MB",
        R.PROCESS_MAX,
        "What a rank holds of its device while engines sample: of its state alone on a CPU.",
    ),
    Entry("memory/trainer_reference", "MB", R.PROCESS_MAX, "Copy of the reference that a rank keeps: `algorithm.kl`."),
    Entry(
        "memory/trainer_arena", "MB", R.PROCESS_MAX, "Host memory that a rank keeps for its state: `trainer.offload`."
    ),
    Entry("memory/trainer_peak", "MB", R.PROCESS_MAX, "Peak memory of a trainer rank: device memory on a GPU."),
    *(
        Entry(f"memory/trainer_peak_{phase}", "MB", R.PROCESS_MAX, f"The same of {what} since the record before.")
        for phase, what in (("score", "the scoring pass"), ("update", "the update"), ("push", "the push"))
    ),
    Entry("memory/engine_peak", "MB", R.PROCESS_MAX, "Peak memory of an engine: device memory on a GPU."),
    Entry("memory/driver_peak", "MB", R.ONE, "Peak resident memory of the driver."),
    Entry(
        "memory/host_run",
        "MB",
        R.ONE,
        "Memory of the driver and all processes under it, those of a local Ray included: anonymous, and shared once.",
    ),
    Entry("memory/host_available", "MB", R.ONE, "What the driver's machine could still give to processes."),
    Entry("eval/avg", "fraction", R.MEAN, "Mean over the benchmarks of avg@k, each with its own k."),
    Entry("eval/greedy", "fraction", R.MEAN, "Mean over the benchmarks of the accuracy of greedy decoding."),
    Entry("eval/tokens", "tokens", R.SUM, "Action tokens sampled for the evaluation."),
    Entry("eval/seconds", "s", R.ONE, "The evaluation, from the first request to the last response."),
)


# What a step took, and not what it found: equal runs differ in these alone.
COSTS = ("time/", "memory/", "throughput/", "idle/", "engine/", "queue/", "bank/", "fleet/", "rates/")

CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
FAMILIES: Mapping[str, Entry] = {entry.name: entry for entry in FAMILY_ENTRIES}

_SYNONYMS = {"accuracy": "reward/correct eval/avg", "kl": "update/kl"}  # what others call it
_LABEL, _COUNT = r"[A-Za-z0-9._-]+", r"[1-9][0-9]*"
_PARTS = {"{age}": r"[0-9]+", "{source}": _LABEL, "{benchmark}": _LABEL, "{name}": _LABEL, "{k}": _COUNT}


def _matcher(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", pattern)
    return re.compile("".join(_PARTS[p] if p.startswith("{") else re.escape(p) for p in pieces))


_MATCHERS = tuple((_matcher(e.name), e) for e in FAMILY_ENTRIES)


def entry(name: str) -> Entry:
    """The catalogue's entry; that of its family for a name with parts a run filled in.

    Raises:
        ValueError: the name is neither in the catalogue nor of a family; the message names the nearest one.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    for matcher, found in _MATCHERS:
        if matcher.fullmatch(name):
            return found
    raise ValueError(f"no metric {name!r} in metrics/catalogue.py{suggest(name, [*CATALOGUE, *FAMILIES], _SYNONYMS)}")


def member(family: str, **parts: str | int) -> str:
    """The name in a family for these parts.

    Raises:
        ValueError: no such family, or a part that its kind does not allow.

    Example:
        member("eval/{benchmark}/avg@{k}", benchmark="aime24", k=32) == "eval/aime24/avg@32"
    """
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r} in metrics/catalogue.py")
    for part, value in parts.items():
        if not re.fullmatch(_PARTS["{" + part + "}"], str(value)):
            raise ValueError(f"metric {family}: {part} = {value!r} does not match {_PARTS['{' + part + '}']}")
    return family.format(**parts)


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
