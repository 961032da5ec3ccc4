"""One finished step as the metrics of the catalogue: everything that was measured in it, reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.host.memory import HostMemory
from stare_megatron.metrics.catalogue import Metric, by_name
from stare_megatron.metrics.reduce import reduce
from stare_megatron.rollout.collect import Collected
from stare_megatron.types import Control, GateDuty, Measured, Observed, ScoreSummary, UpdateStats
from stare_megatron.types.report import EngineLoad

PHASES = ("rollout", "score", "update", "push")
_MB = 2**20


@dataclass(frozen=True)
class StepCosts:
    """What a step took. `seconds`: by phase; `elapsed`: of the run, seconds; peaks in bytes, of each trainer rank, of
    each engine and of the driver; `trainer_memory`: `TrainerGroup.memory`, and what its ranks report;
    `loads`: of each engine while it sampled the step; `rates`: of its phases; `fleet`: how the engines fared."""

    seconds: Mapping[str, float]
    elapsed: float
    trainer_peaks: Sequence[int]
    engine_peaks: Sequence[int]
    trainer_memory: Sequence[Measured]
    driver_peak: int
    host: HostMemory
    loads: Sequence[EngineLoad]
    rates: Sequence[Measured]
    fleet: Sequence[Measured]


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `epoch`: of the prompts; `trained_tokens`: action tokens of all steps so far; `before`: of
    the step before this one; `duty`: this step included."""

    epoch: int
    trained_tokens: int
    before: Observed
    duty: GateDuty


def observed(scores: ScoreSummary, updates: Sequence[UpdateStats]) -> Observed:
    """What the next step is compared with."""
    name = "dynamics/predicted_change"
    return Observed(scores["policy/entropy"], by_name(reduce(u.part(name) for u in updates))[name])


def step_metrics(
    version: int,
    batch: Collected,
    scores: ScoreSummary,
    control: Control,
    updates: Sequence[UpdateStats],
    probe: Sequence[Measured],
    costs: StepCosts,
    progress: Progress,
) -> tuple[Metric, ...]:
    """Metrics of the step that made policy `version`, but for those of `late_metrics`. `probe`: what was measured
    of the push."""
    driver = (
        Measured("data/epoch", progress.epoch),
        Measured("throughput/trained_tokens_total", progress.trained_tokens),
        Measured("throughput/rollout_tokens_per_second", batch.tokens_sampled, batch.seconds),
        Measured("engine/sampling_seconds", batch.seconds),
        Measured("engine/tail_seconds", batch.tail),
        Measured("queue/running", batch.running),
        Measured("queue/ready", batch.ready),
        Measured("bank/groups", batch.resumed.groups),
        Measured("bank/graded", batch.resumed.graded),
        Measured("bank/partial", batch.resumed.partial),
        Measured("bank/again", batch.resumed.again),
        *probe,
        Measured("sync/weight_version", version),
        Measured("dynamics/predicted_change_before", progress.before.predicted),
        Measured("dynamics/measured_change", scores["policy/entropy"] - progress.before.entropy),
    )
    updated = (part for update in updates for part in update.measured)
    control_parts = (*_control(control), Measured("stare/gate_duty", progress.duty.opened, progress.duty.steps))
    return reduce((*batch.measured, *scores.measured, *updated, *control_parts, *driver, *_costs(costs)))


def late_metrics(
    seconds: Mapping[str, float], step_seconds: float, tokens_sampled: int, others: Sequence[Measured]
) -> tuple[Metric, ...]:
    """What is known once the step has been saved and evaluated. `step_seconds`: without the evaluation."""
    return reduce(
        (
            *(Measured(f"time/{phase}", seconds.get(phase, 0.0)) for phase in ("save", "eval")),
            Measured("time/step", step_seconds),
            Measured("throughput/tokens_per_second", tokens_sampled, step_seconds),
            *others,
        )
    )


def _control(control: Control) -> tuple[Measured, ...]:
    return (
        Measured("stare/gate", float(control.gate_on)),
        Measured("stare/weight_pos", control.weight_pos if control.gate_on else 1.0),
        Measured("stare/weight_neg", control.weight_neg if control.gate_on else 1.0),
        Measured("stare/gain", control.gain),
        Measured("policy/target_entropy", control.target),
        Measured("policy/entropy_coefficient", control.entropy_coefficient),
    )


def _costs(costs: StepCosts) -> tuple[Measured, ...]:
    return (
        Measured("time/elapsed", costs.elapsed),
        *(Measured(f"time/{phase}", costs.seconds.get(phase, 0.0)) for phase in PHASES),
        *(Measured("memory/trainer_peak", peak / _MB) for peak in costs.trainer_peaks),
        *(Measured("memory/engine_peak", peak / _MB) for peak in costs.engine_peaks),
        *costs.trainer_memory,
        Measured("memory/driver_peak", costs.driver_peak / _MB),
        Measured("memory/host_run", costs.host.run / _MB),
        Measured("memory/host_available", costs.host.available / _MB),
        *(part for load in costs.loads for part in _load(load)),
        *costs.rates,
        *costs.fleet,
    )


def _load(load: EngineLoad) -> tuple[Measured, ...]:
    return (
        Measured("engine/requests", load.requests, load.iterations),
        Measured("engine/kv_use", load.kv_use, load.iterations),
        Measured("engine/kv_use_max", load.kv_use_max),
        Measured("engine/preemptions", load.preemptions),
        Measured("engine/draft_acceptance", load.tokens_accepted, load.tokens_drafted),
        Measured("engine/draft_gain", load.tokens_accepted, load.drafts),
    )
