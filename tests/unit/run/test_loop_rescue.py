"""Whatever ends the loop: the step learned last is saved, or it is said why not. Every call of it fails once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron import checkpoint
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import Settings, store
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.run import loop
from stare_megatron.run.recorder import Remembered
from stare_megatron.run.saving import Saving
from stare_megatron.run.stop import StopSignal
from stare_megatron.types import EntropyReading, GateDuty, Observed, ScoreSummary, StepStats
from tests.configs import configuration

STEPS = 4
ERRORS = [
    RunError("engine 0: its process died"),
    UserError("a file: is gone"),
    ValueError("a bug"),
    OSError(28, "No space left on device"),
    SystemExit(15),
]


class Ranks:
    """Ranks that hold a step; `held` is None while an update is not done."""

    def __init__(self) -> None:
        self.held: int | None = 0
        self.folder = Path()

    def load(self, batch: Any) -> None: ...

    def score(self) -> EntropyReading:
        return EntropyReading(10, 0.3)

    def update(self, control: Any, *, keep_tokens: bool) -> StepStats:
        assert self.held is not None
        step, self.held = self.held, None
        self.optimize()
        self.held = step + 1
        return StepStats(ScoreSummary((), 10), ())

    def optimize(self) -> None: ...

    def held_step(self) -> int | None:
        return self.held

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        assert step == self.held, "weights saved as those of another step"
        folder.mkdir()
        for name in (".metadata", "metadata.json"):
            (folder / name).write_text(str(step))

    def save_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        return {}

    def export_hf(self, folder: Path) -> None: ...


class Sampler:
    def __init__(self) -> None:
        self.cursor = 0

    def next_batch(self, version: int) -> str:
        self.cursor += 1
        self.serve()
        return f"batch {version}"

    def serve(self) -> None: ...

    def drain(self) -> None: ...

    busy = True

    def settle(self) -> None: ...

    def state(self) -> StreamState:
        return StreamState(0, self.cursor, 1, "x")

    def ahead(self) -> Any:
        return lambda: None

    def close(self) -> None: ...


class Controller:
    state = ControllerState(1.0, 1.0)

    def observe(self, reading: Any) -> str:
        self.state = ControllerState(self.state.weight_pos + 0.125, 1.0)
        return "control"


class Recorder:
    def __init__(self) -> None:
        self.remembered = Remembered(0, Observed(0.5, 0.0), GateDuty(0, 0))

    @contextlib.contextmanager
    def phase(self, name: str) -> Any:
        yield

    def status(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def shows_tokens(self, step: int) -> bool:
        return False

    def remember(self, control: Any, done: StepStats) -> None:
        past = self.remembered
        self.remembered = Remembered(past.trained_tokens + 10, past.before, past.duty)

    def record(self, *_: Any) -> None: ...

    def close(self, step: int) -> None: ...


class Residency:
    engines_sleep = saves_first = False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def to_trainer(self) -> None: ...

    def to_checkpoint(self) -> None: ...

    @contextlib.contextmanager
    def to_engines(self) -> Any:
        yield
        self.wake()

    def wake(self) -> None: ...


def made(folder: Path, **keep: Any) -> SimpleNamespace:
    """The parts of a run: those that save are real, and write to `folder`."""
    config = configuration(run={"dir": str(folder), "name": "r", "steps": STEPS}, checkpoint={"every": 0, **keep})
    said: list[str] = []
    parts = SimpleNamespace(
        root=folder / "r" / "checkpoints",
        said=said,
        sampler=Sampler(),
        trainers=Ranks(),
        controller=Controller(),
        residency=Residency(),
        weights=SimpleNamespace(
            push=lambda version: None,
            score_probe=lambda version: None,
            probe=lambda version, ours: 0.0,
            told=None,
            baseline=0.02,
        ),
        recorder=Recorder(),
        evaluations=SimpleNamespace(due=lambda step: True, evaluate=lambda step: None, give_up=lambda: None),
        stop=StopSignal(lambda text: None),
    )
    parts.weights.trainers = parts.trainers
    saver = checkpoint.Saver(
        parts.root, config.checkpoint, Settings({}, {}), parts.trainers, estimate=10, values=dict, warn=said.append
    )
    parts.saving = Saving(config, saver, parts.weights, parts.sampler, parts.controller, parts.recorder, None)
    return parts


def train(parts: SimpleNamespace) -> int:
    names = ("sampler", "trainers", "controller", "residency", "weights", "recorder", "evaluations", "saving", "stop")
    return loop.train(loop.Run(steps=STEPS, **{name: vars(parts)[name] for name in names}))


def fail(monkeypatch: Any, parts: SimpleNamespace, call: str, error: BaseException, *, always: bool = False) -> None:
    """Let the first call after step 2 was learned raise, or that one and all that follow."""
    name, method = call.split(".")
    part = vars(parts)[name]
    works = getattr(part, method)
    left = [error] * (1000 if always else 1)

    def broken(*args: Any, **named: Any) -> Any:
        held = parts.trainers.held
        if left and (held is None or held >= 2) and parts.recorder.remembered.trained_tokens >= 20:
            raise left.pop()
        return works(*args, **named)

    monkeypatch.setattr(part, method, broken)


CALLS = [
    "sampler.next_batch",
    "sampler.serve",
    "sampler.settle",
    "sampler.drain",
    "residency.to_trainer",
    "trainers.load",
    "trainers.score",
    "controller.observe",
    "trainers.update",
    "weights.push",
    "weights.score_probe",
    "weights.probe",
    "residency.wake",
    "residency.to_engines",
    "residency.to_checkpoint",
    "saving.poll",
    "saving.due",
    "saving.save",
    "saving.export_due",
    "saving.export",
    "trainers.export_hf",
    "trainers.save_written",
    "trainers.begin_save",
    "trainers.finish_save",
    "recorder.record",
    "recorder.shows_tokens",
    "recorder.close",
    "recorder.phase",
    "evaluations.due",
    "evaluations.evaluate",
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_the_step_learned_last_is_saved_whatever_fails(tmp_path, monkeypatch, call, error):
    parts = made(tmp_path, every=2 if call == "trainers.save_written" else 0)
    fail(monkeypatch, parts, call, error)
    with pytest.raises(type(error)) as raised:
        train(parts)
    assert raised.value is error
    last = parts.recorder.remembered.trained_tokens // 10
    assert last >= 2
    newest = store.complete(parts.root)[-1]
    state = checkpoint.read(newest)
    assert (state.step, state.stream.cursor, state.trained_tokens) == (last, last, 10 * last)
    assert state.controller.weight_pos == 1 + last / 8  # not that of the step which failed
    assert (newest / "trainer" / "metadata.json").read_text() == str(last)
    checkpoint.verify(newest, contents=True)


@pytest.mark.parametrize("call", CALLS)
def test_so_it_is_where_a_save_begins_before_the_push(tmp_path, monkeypatch, call):
    parts = made(tmp_path, every=2)
    parts.residency.saves_first = True
    error = RunError("engine 0: its process died")
    fail(monkeypatch, parts, call, error)
    with contextlib.suppress(RunError):  # there is a call that is not made then
        train(parts)
    last = parts.recorder.remembered.trained_tokens // 10
    assert last >= 2
    newest = store.complete(parts.root)[-1]
    assert checkpoint.read(newest).step == parts.trainers.held == last
    checkpoint.verify(newest, contents=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_begins_before_the_push_counts_when_the_step_has_its_row(tmp_path, asynchronous):
    """So that a run that goes on from it after a kill has the rows of all of its steps."""
    parts = made(tmp_path, every=1, keep_last=STEPS, asynchronous=asynchronous)
    parts.residency.saves_first = True
    begun, rows = [], []

    def record(step: int, *_: Any) -> None:
        begun.append((parts.root / f"step_{step:06d}.partial").is_dir())
        rows.append([store.step_of(folder) for folder in store.complete(parts.root)])

    parts.recorder.record = record
    assert train(parts) == STEPS
    assert (begun, rows) == ([True] * STEPS, [list(range(1, step)) for step in range(1, STEPS + 1)])
    assert [store.step_of(folder) for folder in store.complete(parts.root)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("call", CALLS)
def test_at_once_means_at_once_and_is_said(tmp_path, monkeypatch, call):
    parts = made(tmp_path, every=2 if call == "trainers.save_written" else 0)
    fail(monkeypatch, parts, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    held = parts.trainers.held
    saved = [store.step_of(folder) for folder in store.complete(parts.root)]
    assert saved == [held] or parts.said == [f"step {held} is not saved: the run was stopped at once"]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("trainers.optimize", "the update after it has changed weights already"),
        ("trainers.held_step", "trainer rank 0: its process died"),
        ("trainers.begin_save", "trainer rank 0: its process died"),
        ("trainers.finish_save", "trainer rank 0: its process died"),
        ("recorder.remember", "the update after it has changed weights already"),
    ],
)
def test_what_cannot_be_saved_is_said(tmp_path, monkeypatch, call, why):
    parts = made(tmp_path)
    error = RunError("trainer rank 0: its process died")
    fail(monkeypatch, parts, call, error, always=True)
    fail(monkeypatch, parts, "trainers.update" if call == "trainers.held_step" else call, error, always=True)
    with pytest.raises(RunError):
        train(parts)
    assert store.complete(parts.root) == []
    step = 4 if call.endswith("_save") else 2
    assert parts.said == [f"step {step} is not saved: {why}"]


@pytest.mark.parametrize("kind", [ValueError, KeyError])
def test_a_bug_in_saving_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, kind):
    parts = made(tmp_path)
    fail(monkeypatch, parts, "trainers.update", RunError("the run's own"), always=True)
    fail(monkeypatch, parts, "trainers.begin_save", kind("a bug"), always=True)
    monkeypatch.setattr(parts.trainers, "held_step", lambda: parts.saving._learned.step)
    with pytest.raises(RunError, match="the run's own"):
        train(parts)
    assert len(parts.said) == 1
    assert "is not saved" in parts.said[0]


def test_a_full_disk_costs_the_step_and_not_the_message(tmp_path, monkeypatch):
    parts = made(tmp_path, every=1)
    begin = store.begin
    full = OSError(28, "No space left on device")

    def begins(root: Path, state: checkpoint.LoopState, settings: Settings, ahead: None) -> Path:
        if state.step > 2:
            raise full
        return begin(root, state, settings, ahead)

    monkeypatch.setattr(store, "begin", begins)
    with pytest.raises(RunError, match=r"cannot save step 3: .*No space left"):
        train(parts)
    assert [folder.name for folder in store.complete(parts.root)] == ["step_000001", "step_000002"]
    (said,) = parts.said
    assert said.startswith("step 3 is not saved: ")
    assert "No space left" in said


def test_nothing_is_saved_before_something_is_learned(tmp_path):
    parts = made(tmp_path)
    parts.weights.push = lambda version: (_ for _ in ()).throw(RunError("engine 0: its process died"))
    with pytest.raises(RunError):
        train(parts)
    assert (store.complete(parts.root), parts.said) == ([], [])
