"""The recorder on fakes: which seconds belong to which step, what is remembered, and when samples are written."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from stare_megatron.cluster import activity
from stare_megatron.config import RolloutConfig, parse
from stare_megatron.errors import GroupsLostError
from stare_megatron.metrics import trace
from stare_megatron.metrics.catalogue import by_name, metrics
from stare_megatron.run import recorder as module
from stare_megatron.run import timeline
from stare_megatron.run.rates import Rates
from stare_megatron.run.recorder import Recorder, Remembered
from stare_megatron.run.step_metrics import StepCosts
from stare_megatron.types import (
    UNOBSERVED,
    Control,
    GateDuty,
    Group,
    Measured,
    Observed,
    Prompt,
    Score,
    ScoreSummary,
    SequenceCost,
    Span,
    SpanKind,
    Status,
    StepStats,
    Trajectory,
)
from stare_megatron.types.report import Activity, EngineLoad, EngineReport, RankReport

CONTROL = Control(gate_on=True, weight_pos=1.1, weight_neg=1.0, entropy=0.2, target=0.3)
DONE = StepStats(ScoreSummary((), 40), ())
PUSHED = (Measured("throughput/pushed", 3.0), Measured("throughput/pushed", 4.0))  # of two ranks
NO_LOGPROBS = np.zeros(0, np.float32)


def group(name: str, rewards=(1.0, 0.0)) -> Group:
    prompt = Prompt(name, "unit", "3 9 :", (1, 15), "12")

    def trajectory(sample):
        spans = (
            Span(SpanKind.PROMPT, np.array([1, 15], np.int32), NO_LOGPROBS),
            Span(SpanKind.ACTION, np.array([7, 2], np.int32), np.array([-0.5, -0.1], np.float32)),
        )
        return Trajectory(name, sample, spans, Status.COMPLETED, (3, 3), seed=sample)

    scores = tuple(Score(r, r > 0, "") for r in rewards)
    return Group(prompt, tuple(trajectory(i) for i in range(len(rewards))), scores)


SIZE = RolloutConfig().group_size


class Time:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1e9


@pytest.fixture(params=[{}])
def made(tmp_path, monkeypatch, request):
    time = Time()
    for part in (module, timeline, activity):
        monkeypatch.setattr(part, "time", time)
    costs: list[StepCosts] = []

    def step_metrics(*stats):
        costs.append(next(part for part in stats if isinstance(part, StepCosts)))
        return metrics({"reward/mean": 0.5})

    monkeypatch.setattr(module, "step_metrics", step_metrics)
    monkeypatch.setattr(module, "observed", lambda *_: Observed(0.2, -0.01))
    config = parse(
        {
            "run": {"dir": str(tmp_path), "name": "unit", "steps": 10},
            "model": {"path": "m"},
            "data": {"train": ["a.jsonl"]},
            "reward": {"name": "math"},
            "logging": {"samples_every": 2, "samples": 4, **request.param},
        },
        "test",
    )
    config.folder.mkdir()
    logged: list[tuple] = []
    asked: list[list[tuple[int, int]]] = []
    shown: list[str] = []

    def token_records(wanted):
        asked.append(list(wanted))
        return {}

    did: dict[str, tuple[Activity, ...]] = {}  # since the last report
    engines = SimpleNamespace(
        report=lambda: {0: EngineReport(did.pop("engine", ()), 1 << 20, EngineLoad())}, measured=lambda: ()
    )
    trainers = SimpleNamespace(
        report=lambda: [RankReport(did.pop("trainer", ()), 1 << 20, PUSHED)],
        memory=lambda: [Measured("time/offload", 2.0)],
        token_records=token_records,
    )
    watched: list[str] = []
    lookout = SimpleNamespace(step=0, during=lambda phase: contextlib.nullcontext(watched.append(phase)))
    groups = [group("a"), group("b")]
    batch = SimpleNamespace(
        seconds=1.0,
        groups=tuple((g, g.summary()) for g in groups),
        tokens_sampled=600,
        sampled=[g.summary() for g in groups] * 2 + [groups[0].summary()],
    )
    sinks = SimpleNamespace(
        status=lambda text: None,
        log=lambda step, values, late: logged.append((step, by_name(values), by_name(late))),
        sample=lambda step, rows, text: shown.append(text),
        complete=lambda step, late: logged.append((step, by_name(late))),
    )
    recorder = Recorder(
        config,
        SimpleNamespace(trainers=trainers, engines=engines, lookout=lookout),
        SimpleNamespace(state=lambda: SimpleNamespace(epoch=0)),
        sinks,
        list,
        lambda ids: " ".join(map(str, ids)),
        Rates(SequenceCost(1.0, 1.0), ranks=1, workers=1, devices=2, peak=math.nan, scores=True),
    )
    return SimpleNamespace(
        recorder=recorder,
        time=time,
        logged=logged,
        costs=costs,
        asked=asked,
        shown=shown,
        batch=batch,
        did=did,
        folder=config.folder,
        lookout=lookout,
        watched=watched,
    )


def spend(made, phase: str, seconds: float) -> None:
    with made.recorder.phase(phase):
        made.time.now += seconds


def test_phases_are_watched_for_hangs_under_the_number_of_their_step(made):
    spend(made, "push", 1.0)
    made.recorder.close(4)
    spend(made, "rollout", 1.0)
    assert made.watched == ["push", "rollout"]
    assert made.lookout.step == 5


def test_seconds_belong_to_the_step_they_were_spent_in(made):
    spend(made, "push", 50.0)  # the first push and an evaluation before any step belong to none
    spend(made, "eval", 70.0)
    made.recorder.close(0)
    assert made.logged == []
    for step in (1, 2):
        spend(made, "rollout", 10.0)
        made.recorder.record(step, made.batch, CONTROL, DONE, math.nan)
        spend(made, "eval", 3.0 * step)
        spend(made, "save", 5.0 * step)
        made.recorder.close(step)
    first, first_late, second, second_late = made.logged
    assert (first[0], second[0]) == (1, 2)
    assert first[1] == {"reward/mean": 0.5}
    nothing_done = {"idle/engines": 1.0, "idle/trainers": 1.0}
    rate, each = "throughput/tokens_per_second", "throughput/tokens_per_second_per_device"
    provisional = {"time/save": 0.0, "time/eval": 0.0, "time/step": 10.0, rate: 60.0, each: 30.0} | nothing_done
    assert first[2] == provisional
    settled = {"time/save": 5.0, "time/eval": 3.0, "time/step": 15.0, rate: 40.0, each: 20.0}
    assert first_late == (1, provisional | settled)
    assert second_late[1]["time/save"] == 10.0
    assert second_late[1]["time/eval"] == 6.0
    assert second_late[1]["time/step"] == 20.0


def test_what_ranks_report_is_among_the_costs_of_the_step(made):
    made.recorder.record(1, made.batch, CONTROL, DONE, math.nan)
    (costs,) = made.costs
    assert tuple(costs.trainer_memory) == (Measured("time/offload", 2.0), *PUSHED)
    assert list(costs.trainer_peaks) == [1 << 20]


def test_what_is_remembered_goes_from_step_to_step(made):
    assert made.recorder.remembered == Remembered(0, UNOBSERVED, GateDuty(0, 0))
    made.recorder.remember(CONTROL, DONE)
    assert made.recorder.remembered == Remembered(40, Observed(0.2, -0.01), GateDuty(1, 1))
    made.recorder.remembered = Remembered(400, Observed(0.3, 0.0), GateDuty(10, 4))  # restored
    made.recorder.remember(CONTROL, DONE)
    assert made.recorder.remembered == Remembered(440, Observed(0.2, -0.01), GateDuty(11, 5))


def test_samples_are_written_when_due_with_what_the_update_knew(made):
    assert [step for step in range(1, 7) if made.recorder.shows_tokens(step)] == [1, 2, 4, 6]
    for step in (1, 2, 3):
        spend(made, "rollout", 1.0)
        made.recorder.record(step, made.batch, CONTROL, DONE, math.nan)
        made.recorder.close(step)
    names = sorted(p.name for p in (made.folder / "samples").glob("*.txt"))
    assert names == ["step_000001.txt", "step_000002.txt"]
    assert [sorted(wanted) for wanted in made.asked] == [[(0, 0), (0, 1), (1, 0), (1, 1)]] * 2
    head = (made.folder / "samples" / names[0]).read_text().partition("\n")[0]
    assert head.endswith(f"of the {2 * SIZE} in the update batch; {5 * SIZE} were sampled since the one before")
    assert len(made.shown) == 2


def test_samples_that_a_lost_node_had_are_not_written_and_the_run_goes_on(made, monkeypatch):
    def lost(refs):
        raise GroupsLostError("a group of the batch is lost with its node")

    notes: list[str] = []
    monkeypatch.setattr(made.recorder, "_fetch", lost)
    monkeypatch.setattr(made.recorder, "note", notes.append)
    made.recorder.record(1, made.batch, CONTROL, DONE, math.nan)
    assert [step for step, *_ in made.logged] == [1]
    assert notes == ["samples of step 1 are not written: a group of the batch is lost with its node"]
    assert not (made.folder / "samples").exists()


def test_idle_shares_and_the_trace_are_of_the_step(made):
    """Two groups overlap in the engine for 6 of 10 s; the rank works for 4, one of them after the step was recorded."""
    for step in (1, 2):
        began = made.time.time()
        with made.recorder.phase("rollout"):
            made.time.now += 6.0
            made.did["engine"] = (Activity("sample", began, 4.0, "a"), Activity("sample", began + 2.0, 4.0, "b"))
        with made.recorder.phase("update"):
            made.time.now += 3.0
            made.did["trainer"] = (Activity("update", began + 6.0, 3.0),)
        made.recorder.record(step, made.batch, CONTROL, DONE, math.nan)
        spend(made, "save", 1.0)
        made.did["trainer"] = (Activity("begin_save", began + 9.0, 1.0),)
        made.recorder.close(step)
        at_record, when_done = made.logged[-2][2], made.logged[-1][1]
        assert at_record["idle/engines"] == pytest.approx(3 / 9)
        assert when_done["idle/engines"] == pytest.approx(4 / 10)
        assert when_done["idle/trainers"] == pytest.approx(6 / 10)
    first, second = trace.read(made.folder)
    assert (first.step, second.step) == (1, 2)
    assert [a.name for a in second.tracks["driver"]] == ["step 2", "rollout", "update", "save"]
    whole, *phases = second.tracks["driver"]
    assert whole.seconds == pytest.approx(sum(p.seconds for p in phases)) == 10.0
    assert [a.name for a in second.tracks["trainer rank 0"]] == ["update", "begin_save"]
    assert second.trained == ["a", "b"]


@pytest.mark.parametrize("made", [{"trace": False}], indirect=True)
def test_without_a_trace_nothing_is_kept_of_it(made):
    spend(made, "rollout", 4.0)
    made.did["engine"] = (Activity("sample", made.time.time() - 4.0, 3.0),)
    made.recorder.record(1, made.batch, CONTROL, DONE, math.nan)
    made.recorder.close(1)
    assert made.logged[-1][1]["idle/engines"] == pytest.approx(1 / 4)
    assert not (made.folder / trace.FILE).exists()
