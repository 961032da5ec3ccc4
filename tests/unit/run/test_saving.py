"""When a run saves and exports, and what is in a save."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Settings, store
from stare_megatron.config import parse
from stare_megatron.data.prompts import StreamState
from stare_megatron.run.recorder import Remembered
from stare_megatron.run.saving import Saving, metric_by_step
from stare_megatron.types import UNOBSERVED, GateDuty, Observed


class Saver:
    def __init__(self):
        self.said = []
        self.pending = False

    def save(self, state, ahead, *, last):
        self.said.append(("save", state))
        self.ahead, self.last = ahead, last

    def goes_on_from(self, folder):
        self.source = folder

    def wait(self):
        self.said.append(("wait", None))

    def poll(self):
        self.said.append(("poll", None))


class Recorder:
    remembered = Remembered(70, Observed(0.4, -0.1), GateDuty(7, 3))

    def __init__(self):
        self.phases = []
        self.notes = []

    @contextlib.contextmanager
    def phase(self, name):
        self.phases.append(name)
        yield

    def status(self, text): ...

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def parts(tmp_path):
    def make(resume_from=None, **checkpoint):
        config = parse(
            {
                "run": {"dir": str(tmp_path), "name": "unit", "steps": 10},
                "model": {"path": "m"},
                "data": {"train": ["a.jsonl"]},
                "reward": {"name": "math"},
                "checkpoint": checkpoint,
            },
            "test",
        )
        exported = []
        made = SimpleNamespace(
            saver=Saver(),
            recorder=Recorder(),
            trainers=SimpleNamespace(export_hf=exported.append, restore=lambda _: None),
            sampler=SimpleNamespace(cursor=0),
            controller=SimpleNamespace(state=ControllerState(1.1, 0.9)),
            exported=exported,
        )
        made.sampler.state = lambda: StreamState(0, made.sampler.cursor, 1, "x")
        made.sampler.ahead = lambda: lambda: f"sampled after {made.sampler.cursor}"
        made.saving = Saving(
            config,
            made.saver,
            SimpleNamespace(baseline=0.02, trainers=made.trainers),
            made.sampler,
            made.controller,
            made.recorder,
            resume_from=resume_from,
        )
        return made

    return make


def test_due_by_number_and_at_the_end(parts):
    assert [s for s in range(1, 11) if parts(every=4).saving.due(s)] == [4, 8, 10]
    assert [s for s in range(1, 11) if parts(every=0).saving.due(s)] == [10]


def test_a_save_holds_what_the_loop_knows(parts):
    made = parts()
    made.sampler.cursor = 5
    made.saving.save(7, last=False)
    ((what, state),) = made.saver.said
    assert what == "save"
    assert (state.step, state.trained_tokens, state.stream.cursor, state.duty) == (7, 70, 5, GateDuty(7, 3))
    assert state.probe_baseline == 0.02
    assert (made.saver.ahead, made.saver.last) == ("sampled after 5", False)
    assert (state.controller, state.before) == (ControllerState(1.1, 0.9), Observed(0.4, -0.1))
    made.saving.save(8, last=True)  # nothing follows that it could be written beside
    assert [what for what, _ in made.saver.said] == ["save", "save", "wait"]
    assert made.saver.last


def test_a_save_under_way_is_looked_at_once_a_step(parts):
    made = parts()
    made.saving.poll()
    assert (made.saver.said, made.recorder.phases) == ([], [])
    made.saver.pending = True
    made.saving.poll()
    assert (made.saver.said, made.recorder.phases) == ([("poll", None)], ["save"])


def test_a_run_that_ends_well_waits_for_copies(parts):
    made = parts()
    with made.saving:
        assert made.saver.said == []
    assert made.saver.said == [("wait", None)]


def test_exports(parts, tmp_path):
    def of(**checkpoint):
        made = parts(**checkpoint)
        for step in range(1, 11):
            if made.saving.export_due(step):
                made.saving.export(step)
        return [path.relative_to(tmp_path / "unit").as_posix() for path in made.exported]

    assert of() == ["hf"]
    assert of(export_final=False) == []
    assert of(export_every=5) == ["exports/step_000005", "exports/step_000010", "hf"]


def test_nothing_to_restore_is_step_0(parts):
    assert parts().saving.restore() == 0


def test_who_goes_on_from_an_older_checkpoint_leaves_the_later_ones_aside(parts, tmp_path):
    root = tmp_path / "unit/checkpoints"
    for step in (20, 40, 60):
        state = LoopState(step, 7, StreamState(0, 1, 1, "x"), ControllerState(1.0, 1.0), UNOBSERVED, GateDuty(7, 3), "")
        (store.begin(root, state, Settings({}, {})) / store.TRAINER).mkdir()
        store.finish(root, step, {})
    made = parts(resume_from=root / "step_000020")
    assert made.saving.restore() == 20
    assert made.saver.source == root / "step_000020"
    assert (root / "latest").read_text() == "step_000020\n"
    assert store.find(root, "auto") == root / "step_000020"
    (note,) = made.recorder.notes
    assert "step 20" in note
    assert "left_step_000040, left_step_000060" in note
    assert (root / "left_step_000060/loop.json").is_file()
    assert parts(resume_from=root / "step_000020").saving.restore() == 20
    assert made.recorder.notes == [note]


def test_values_of_the_best_metric_come_from_steps_and_evaluations(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": "NaN"}\n')
    assert metric_by_step(tmp_path, "eval/avg") == {}
    (tmp_path / "eval.jsonl").write_text('{"step": 2, "eval/avg": 0.25}\n')
    assert metric_by_step(tmp_path, "eval/avg") == {2: 0.25}
    assert metric_by_step(tmp_path, "reward/mean")[1] == 0.5
