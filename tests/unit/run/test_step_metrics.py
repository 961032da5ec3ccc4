"""A step's metrics against the definitions of each, from random numbers; and that the catalogue's reduction counts."""

import dataclasses
import math
import os
import random
from dataclasses import dataclass

import pytest

from stare_megatron.algo.dynamics import from_totals
from stare_megatron.host.memory import HostMemory, host_memory
from stare_megatron.metrics import catalogue
from stare_megatron.metrics import reduce as reduction
from stare_megatron.metrics.catalogue import Reduction, by_name
from stare_megatron.rollout.collect import Collected, Resumed, _measure_kept, age_quantile, measure
from stare_megatron.run import step_metrics as module
from stare_megatron.run.step_metrics import Progress, StepCosts, late_metrics, observed, step_metrics
from stare_megatron.types import (
    QUADRANTS,
    UNOBSERVED,
    Control,
    GateDuty,
    GroupSummary,
    Measured,
    Observed,
    ScoreSummary,
    Status,
    UpdateStats,
)
from stare_megatron.types.report import EngineLoad
from tests.unit.run.random_groups import REPORTED, random_group

VERSION = 9
BY_UPDATE = {  # name: whether it has a weight
    "update/loss": False,
    "update/grad_norm": False,
    "update/lr": False,
    "update/loss_scale": False,
    "update/overflows": False,
    "update/ratio_max": False,
    "update/clip_fraction": True,
    "update/kl": True,
    "loss/detached": True,
    "loss/penalty": True,
    "correction/mean": True,
    "correction/bounded": True,
    "stare/selected_pos": False,
    "stare/selected_neg": False,
    "stare/tokens_pos": False,
    "stare/tokens_neg": False,
    "throughput/trained_tokens": False,
    "packing/cost_imbalance": False,
    "packing/largest_tokens": False,
}
REFERRED = {"kl/reference": 0.25, "kl/penalty": 0.75}  # beside (7, 3, 5); each has a weight
SCORED = ("policy/entropy", "policy/entropy_estimate", "policy/surprisal", "mismatch/mean", "mismatch/kl")
SINGLE = (
    "policy/entropy_estimate_error",
    "mismatch/max",
    "mismatch/ratio_max",
    "mismatch/ess",
    "mismatch/sequence_ratio_max",
    "mismatch/sequence_ess",
)

# Idle seconds, of seconds.
RESUMED = Resumed(groups=4, graded=9, partial=7, again=6)
PROBE = (Measured("sync/probe", 1e-6), Measured("sync/compared", 6, 8))
SAMPLING_S = 1.75
TAIL_S = 0.625
AGE = {"tokens": (90,), "entropy": (30.0, 90), "mismatch": (1.5, 90), "ess": (0.75,), "bounded": (9, 90)}
AGES = tuple(Measured(f"age/1/{name}", *parts) for name, parts in (AGE | {"selected": (8, 64)}).items())
IDLE = {"engines": [(1.0, 4.5), (3.0, 4.25)], "trainers": [(2.0, 4.5), (0.5, 4.0), (2.5, 4.25)]}
RATES = {
    f"rates/{phase}_{unit}": (3.0 + i, 16.0 / (i + 1) + j)
    for i, phase in enumerate(("rollout", "score", "update"))
    for j, unit in enumerate(("tflops", "mfu"))
}
FULL, DRAFTS = ((10, 30, 2.5, 0.5, 3), (40, 60, 9.0, 0.75, 1), (5, 50, 1.0, 0.25, 2)), ((4, 12, 3), (), (2, 8, 7))
FLEET = {"fleet/healthy": 3, "fleet/restarts": 2, "fleet/groups_again": 5}
OF_RANKS = (
    "time/offload",
    "time/onload",
    "time/reference",
    *(f"memory/trainer_{part}" for part in ("parameters", "gradients", "optimizer", "resident", "reference", "arena")),
    *(f"memory/trainer_peak_{phase}" for phase in ("score", "update", "push")),
)
RANKS = [Measured(name, rank + n) for rank in (1.0, 3.0, 2.0) for n, name in enumerate(OF_RANKS)]
MOVED_MB = {"throughput/pushed": [(7.0, 1), (5.0, 1)], "throughput/saved": [(2.0, 1), (9.0, 1)]}
MOVED_GB = {"rates/push_gbps": [(3.0, 0.5), (1.0, 1.5)], "rates/save_gbps": [(2.0, 1.0), (2.0, 3.0)]}
RANKS += [Measured(name, *part) for name, parts in (MOVED_MB | MOVED_GB).items() for part in parts]


@dataclass(frozen=True)
class Step:
    """What a step was made of: sampled groups with their labels, of which the first four are kept."""

    groups: list[tuple[GroupSummary, str]]
    scores: ScoreSummary
    updates: list[UpdateStats]
    totals: list[list[int]]  # of algo.dynamics.measure
    control: Control
    costs: StepCosts
    progress: Progress

    @property
    def kept(self) -> list[GroupSummary]:
        return [group for group, _ in self.groups[:4]]

    def metrics(self) -> dict[str, float]:
        parts = [part for group, label in self.groups for part in measure(group, label)]
        parts += [Measured("groups/dropped", 2)]
        parts += [part for group in self.kept for part in _measure_kept(group, VERSION - 1)]
        parts.append(Measured("sync/staleness_p95", age_quantile(self.kept, VERSION - 1, 0.95)))
        parts.append(Measured("fleet/groups_again", 6))  # a batch that was given up
        batch = Collected((), tuple(g for g, _ in self.groups), tuple(parts), SAMPLING_S, TAIL_S, 3, 5, RESUMED)
        stats = (batch, self.scores, self.control, self.updates, PROBE, self.costs, self.progress)
        idle = [Measured(f"idle/{kind}", *part) for kind, parts in IDLE.items() for part in parts]
        others = [*idle, Measured("throughput/tokens_per_second_per_device", 90.0, 12.0)]
        late = late_metrics({"save": 1.5, "eval": 2.5}, 4.0, batch.tokens_sampled, others)
        return by_name((*step_metrics(VERSION, *stats), *late))


def random_step(seed: int) -> Step:
    rng = random.Random(seed)
    totals, updates = [], []
    for u in range(3):
        counts = [
            rng.randrange(200, 300),
            *(rng.randrange(1, 50) for _ in range(4)),
            rng.randrange(1, 9),
            10 + u,
            u + 1,
        ]
        totals.append([*counts, *(rng.randrange(-(2**30), 2**30) for _ in range(10))])
        # The first and the last update are the extremes of none.
        own = [
            Measured(name, (7, 3, 5)[u] + rng.random(), (90, 50, 70)[u] if w else 1) for name, w in BY_UPDATE.items()
        ]
        own += [Measured(name, (7, 3, 5)[u] + more, (90, 50, 70)[u]) for name, more in REFERRED.items()]
        updates.append(UpdateStats((*own, *from_totals(totals[-1]))))
    scored = (Measured(name, 100 * rng.random(), 210) for name in SCORED)
    single = (Measured(name, rng.random()) for name in SINGLE)
    seconds = {name: rng.random() for name in ("rollout", "score", "update", "push")}
    return Step(
        groups=[(random_group(rng, i), "ab"[i % 2]) for i in range(7)],
        scores=ScoreSummary((*scored, *single, *AGES), 210),
        updates=updates,
        totals=totals,
        control=Control(True, 1.25, 0.75, 0.5, 0.625, 0.01, 0.0625),
        costs=StepCosts(
            seconds,
            17.0,
            [5 << 20, 7 << 20, 6 << 20],
            [9 << 20, 3 << 20],
            RANKS,
            2 << 20,
            HostMemory(8, 9),
            [EngineLoad(*full, *drafts) for full, drafts in zip(FULL, DRAFTS, strict=True)],
            [Measured(name, *part) for name, part in RATES.items()],
            [Measured(name, value) for name, value in FLEET.items()],
        ),
        progress=Progress(2, 12345, Observed(0.5, -0.25), GateDuty(8, 3)),
    )


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def sampled(step: Step) -> dict[str, float]:
    groups = [group for group, _ in step.groups]
    n = len(groups)

    def each(field):
        return [x for group in groups for x in getattr(group, field)]

    def episodes(field):
        return [getattr(e, field) for e in each("episodes")]

    found = {
        "reward/mean": mean(each("rewards")),
        "reward/kept_mean": mean(r for group in step.kept for r in group.rewards),
        "reward/correct": mean(each("correct")),
        "groups/sampled": n,
        "groups/all_correct": sum(all(g.correct) for g in groups),
        "groups/none_correct": sum(not any(g.correct) for g in groups),
        "groups/all_correct_ratio": sum(all(g.correct) for g in groups) / n,
        "groups/none_correct_ratio": sum(not any(g.correct) for g in groups) / n,
        "groups/dropped": 2,
        "groups/zero_variance_kept": sum(g.zero_variance for g in step.kept),
        "response/length_mean": mean(each("num_action_tokens")),
        "response/length_max": max(each("num_action_tokens")),
        "response/truncated": mean(s.is_truncated for s in each("statuses")),
        "response/failed": each("statuses").count(Status.FAILED),
        "response/inexact": each("statuses").count(Status.INEXACT),
        "response/ungraded": each("graded").count(False),
        "response/reflections": mean(each("reflections")),
        "tools/call_errors": sum(episodes("call_errors")) / sum(episodes("calls")),
        "tools/seconds": mean(episodes("tool_seconds")),
        "tools/seconds_max": max(episodes("tool_seconds")),
        "sync/staleness": VERSION - 1 - min(v for group in step.kept for v in group.weight_versions),
    }
    samples = [runs for group in step.kept for runs in group.versions]
    ages = sorted(VERSION - 1 - v for runs in samples for v, tokens in runs for _ in range(tokens))
    found |= {
        "age/1/tokens": 90,
        "age/1/entropy": 30.0 / 90,
        "age/1/mismatch": 1.5 / 90,
        "age/1/ess": 0.75,
        "age/1/bounded": 0.1,
        "age/1/selected": 0.125,
        "sync/staleness_mean": mean(ages),
        "sync/staleness_p95": ages[math.ceil(0.95 * len(ages)) - 1],
        "sync/version_spans": mean(len(runs) for runs in samples),
        "sync/version_spans_max": max(len(runs) for runs in samples),
    }
    found |= {f"tools/{name}": mean(episodes(name)) for name in ("turns", "calls", "observation_tokens", "void")}
    for label in "ab":
        own = [group for group, of in step.groups if of == label]
        found[f"source/{label}/reward"] = pytest.approx(mean(r for group in own for r in group.rewards), rel=1e-14)
        found[f"source/{label}/correct"] = mean(c for group in own for c in group.correct)
    for name, function in REPORTED.items():
        found[name] = function([part.total for group in groups for part in group.measured if part.name == name])
    return found


def updated(step: Step) -> dict[str, float]:
    each = {name: [u[name] for u in step.updates] for name in (*BY_UPDATE, *REFERRED)}
    found = {name: mean(values) for name, values in each.items()}
    summed = ("stare/selected_pos", "stare/selected_neg", "stare/tokens_pos", "stare/tokens_neg", "update/overflows")
    found |= {name: sum(each[name]) for name in (*summed, "throughput/trained_tokens")}
    found |= {name: each[name][-1] for name in ("update/lr", "update/loss_scale")}
    found |= {name: max(each[name]) for name in ("update/ratio_max", "packing/largest_tokens")}
    columns = list(zip(*step.totals, strict=True))
    units = [sum(column) if i < 8 else sum(column) / 2**24 for i, column in enumerate(columns)]
    tokens, both, either, broken, change, critical = (units[i] for i in (0, 5, 6, 7, 8, 9))
    predicted = sum(sum(row[11::2]) for row in step.totals) / 2**24
    found |= {
        "dynamics/predicted_change": predicted / tokens,
        "dynamics/predicted_change_unweighted": change / tokens,
        "dynamics/critical_surprisal": critical / tokens,
        "dynamics/overlap": both / either,
        "dynamics/non_finite": broken,
    }
    for kind, first, stride, scale in (("tokens", 1, 1, 1), ("advantage", 10, 2, 2**24), ("change", 11, 2, 2**24)):
        rows = [[row[first + stride * q] for q in range(4)] for row in step.totals]
        whole = sum(abs(x) for row in rows for x in row) / scale
        for q, name in enumerate(QUADRANTS):
            found[f"dynamics/{kind}_{name}"] = sum(row[q] for row in rows) / scale / whole
    return found


def expected(step: Step) -> dict[str, float]:
    """Each metric of the catalogue by its definition."""
    tokens = sum(n for group, _ in step.groups for n in group.num_action_tokens)
    found = {name: step.scores.part(name).total / 210 for name in SCORED}
    found |= {name: step.scores.part(name).total for name in SINGLE}
    found |= {f"time/{phase}": seconds for phase, seconds in step.costs.seconds.items()}
    found |= {name: total / weight for name, (total, weight) in RATES.items()} | FLEET
    found["fleet/groups_again"] += 6
    return (
        sampled(step)
        | updated(step)
        | found
        | {
            "data/epoch": 2,
            "policy/target_entropy": 0.625,
            "policy/entropy_coefficient": 0.01,
            "stare/gate": 1.0,
            "stare/gate_duty": 3 / 8,
            "stare/weight_pos": 1.25,
            "stare/weight_neg": 0.75,
            "stare/gain": 0.0625,
            "dynamics/predicted_change_before": -0.25,
            "dynamics/measured_change": found["policy/entropy"] - 0.5,
            **{"sync/probe": 1e-6, "sync/compared": 0.75},
            "sync/weight_version": VERSION,
            "throughput/tokens_per_second": tokens / 4.0,
            "throughput/rollout_tokens_per_second": tokens / SAMPLING_S,
            "engine/sampling_seconds": SAMPLING_S,
            "engine/tail_seconds": TAIL_S,
            **{"queue/running": 3, "queue/ready": 5, **{f"bank/{n}": v for n, v in vars(RESUMED).items()}},
            "throughput/trained_tokens_total": 12345,
            "time/step": 4.0,
            "time/save": 1.5,
            "time/eval": 2.5,
            "time/elapsed": 17.0,
            **{name: 3.0 + n for n, name in enumerate(OF_RANKS)},
            **{"throughput/pushed": 12.0, "throughput/saved": 11.0, "rates/push_gbps": 2.0, "rates/save_gbps": 1.0},
            "memory/trainer_peak": 7.0,
            "memory/engine_peak": 9.0,
            "memory/driver_peak": 2.0,
            "memory/host_run": 8 / 2**20,
            "memory/host_available": 9 / 2**20,
            "idle/engines": 4.0 / 8.75,
            "idle/trainers": 5.0 / 12.75,
            "throughput/tokens_per_second_per_device": 7.5,
            "engine/requests": 140 / 55,
            "engine/kv_use": 12.5 / 55,
            "engine/kv_use_max": 0.75,
            "engine/preemptions": 6,
            **{"engine/draft_acceptance": 10 / 20, "engine/draft_gain": 10 / 6},
        }
    )


STEP = [name for name in catalogue.CATALOGUE if not name.startswith(("eval/", "sft/"))]


@pytest.mark.parametrize("seed", range(5))
def test_every_metric_is_what_it_is_defined_as(seed):
    """To the bit; and all of the catalogue is there."""
    step = random_step(seed)
    got, want = step.metrics(), expected(step)
    assert {name: got[name] for name in want} == want
    assert got.keys() == want.keys() >= set(STEP)


MEANS = {Reduction.MEAN, Reduction.TOKEN_MEAN, Reduction.FRACTION}
SUMS = {Reduction.SUM, Reduction.UPDATE_SUM}
MAXIMA = {Reduction.MAX, Reduction.UPDATE_MAX, Reduction.PROCESS_MAX}
# Largest already where they are measured: over tokens on the ranks, over engines after a push.
MEASURED_AS_ONE = {"mismatch/max", "mismatch/ratio_max", "mismatch/sequence_ratio_max", "sync/probe"}
FAMILIES = [name for name in catalogue.FAMILIES if not name.startswith("eval/")]


@pytest.fixture(scope="module")
def parts() -> list[Measured]:
    """Everything that was measured in a step."""
    found: list[Measured] = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "reduce", lambda measured: found.extend(measured) or ())
        random_step(1).metrics()
    return found


@pytest.mark.parametrize("family", [*STEP, *FAMILIES])
def test_another_reduction_would_give_another_number(family, parts, monkeypatch):
    """So a wrong line of the catalogue fails the test above, or stops the run."""
    name = family.format(source="a", name="x", age=1)
    true, want = catalogue.entry(name), expected(random_step(1))[name]
    own = [part for part in parts if part.name == name]
    agreeing = set()
    for other in Reduction:
        wrong = dataclasses.replace(true, reduction=other)
        monkeypatch.setattr(reduction, "entry", lambda n, wrong=wrong: wrong)
        try:
            (metric,) = reduction.reduce(own)
        except ValueError:
            continue
        agreeing |= {other} if metric.value == want else set()
    assert true.reduction in agreeing
    if [part.weight for part in own] == [1]:
        assert true.reduction is Reduction.ONE or (name in MEASURED_AS_ONE and true.reduction is Reduction.MAX)
    else:
        alike = next(({*alike} for alike in (MEANS, SUMS, MAXIMA) if true.reduction in alike), {true.reduction})
        if len({part.weight for part in own}) == 1 and agreeing & MEANS:
            alike |= {*MEANS, Reduction.UPDATE_MEAN}  # there is no telling
        assert agreeing <= alike


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match=r"groups/sampled: .* are no parts of: sum"):
        reduction.reduce([Measured("groups/sampled", 3.0, 2)])
    with pytest.raises(ValueError, match=r"data/epoch: .* are no parts of: one value per step"):
        reduction.reduce([Measured("data/epoch", 1), Measured("data/epoch", 1)])
    with pytest.raises(ValueError, match=r"no metric 'update/lose'.*'update/loss'"):
        reduction.reduce([Measured("update/lose", 1.0)])
    assert math.isnan(reduction.reduce([Measured("reward/mean", 0, 0)])[0].value)


def test_what_the_next_step_is_compared_with():
    step = random_step(4)
    values = step.metrics()
    after = observed(step.scores, step.updates)
    assert after == Observed(values["policy/entropy"], values["dynamics/predicted_change"])
    first = dataclasses.replace(step, progress=dataclasses.replace(step.progress, before=UNOBSERVED)).metrics()
    assert math.isnan(first["dynamics/measured_change"])
    assert math.isnan(first["dynamics/predicted_change_before"])


def test_a_shut_gate_weighs_with_1():
    shut = dataclasses.replace(random_step(4), control=Control(False, 1.25, 0.75, 0.5, 0.625)).metrics()
    assert [shut[f"stare/{name}"] for name in ("gate", "weight_pos", "weight_neg")] == [0.0, 1.0, 1.0]


def test_gate_duty_counts_steps():
    assert GateDuty(3, 1).after(Control(True, 1.1, 0.9, 0.1, 0.2)) == GateDuty(4, 2)


def test_host_memory_counts_what_this_process_holds():
    before = host_memory()
    held = bytearray(os.urandom(1)) * (64 << 20)
    after = host_memory()
    assert 60 << 20 < after.run - before.run < 80 << 20
    assert after.available > 0
    assert len(held) == 64 << 20
