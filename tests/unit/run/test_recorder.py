"""The recorder on fakes: which seconds belong to which step, what is remembered, and when samples are written."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from stare_megatron.config import RolloutConfig, parse
from stare_megatron.metrics.catalogue import by_name, metrics
from stare_megatron.run import recorder as module
from stare_megatron.run.recorder import Recorder, Remembered
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
    Span,
    SpanKind,
    Status,
    StepStats,
    Trajectory,
)

CONTROL = Control(gate_on=True, weight_pos=1.1, weight_neg=1.0, entropy=0.2, target=0.3)
DONE = StepStats(ScoreSummary((), 40), ())
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


@pytest.fixture
def made(tmp_path, monkeypatch):
    time = Time()
    monkeypatch.setattr(module, "time", time)
    monkeypatch.setattr(module, "step_metrics", lambda *_: metrics({"reward/mean": 0.5}))
    monkeypatch.setattr(module, "observed", lambda *_: Observed(0.2, -0.01))
    config = parse(
        {
            "run": {"dir": str(tmp_path), "name": "unit", "steps": 10},
            "model": {"path": "m"},
            "data": {"train": ["a.jsonl"]},
            "reward": {"name": "math"},
            "logging": {"samples_every": 2, "samples": 4},
        },
        "test",
    )
    logged: list[tuple] = []
    asked: list[list[tuple[int, int]]] = []
    shown: list[str] = []

    def token_records(wanted):
        asked.append(list(wanted))
        return {}

    trainers = SimpleNamespace(
        peak_memory_bytes=lambda: [1 << 20], memory=lambda: [Measured("time/offload", 2.0)], token_records=token_records
    )
    groups = [group("a"), group("b")]
    batch = SimpleNamespace(groups=tuple((g, g.summary()) for g in groups), tokens_sampled=600, groups_sampled=5)
    sinks = SimpleNamespace(
        status=lambda text: None,
        log=lambda step, values, late: logged.append((step, by_name(values), by_name(late))),
        sample=shown.append,
        complete=lambda step, late: logged.append((step, by_name(late))),
    )
    recorder = Recorder(
        config,
        SimpleNamespace(trainers=trainers, engines=SimpleNamespace(peak_memory_bytes=lambda: [1 << 20])),
        SimpleNamespace(state=lambda: SimpleNamespace(epoch=0)),
        sinks,
        list,
        lambda ids: " ".join(map(str, ids)),
    )
    return SimpleNamespace(
        recorder=recorder, time=time, logged=logged, asked=asked, shown=shown, batch=batch, folder=tmp_path / "unit"
    )


def spend(made, phase: str, seconds: float) -> None:
    with made.recorder.phase(phase):
        made.time.now += seconds


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
    provisional = {"time/save": 0.0, "time/eval": 0.0, "time/step": 10.0, "throughput/tokens_per_second": 60.0}
    assert first[2] == provisional
    assert first_late == (
        1,
        provisional | {"time/save": 5.0, "time/eval": 3.0, "time/step": 15.0} | {"throughput/tokens_per_second": 40.0},
    )
    assert second_late[1]["time/save"] == 10.0
    assert second_late[1]["time/eval"] == 6.0
    assert second_late[1]["time/step"] == 20.0


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
    assert head.endswith(f"of the {2 * SIZE} in the update batch; {5 * SIZE} were sampled")
    assert len(made.shown) == 2
