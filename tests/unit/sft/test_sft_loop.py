"""The loop of supervised training with ranks that only count: what is measured, saved and exported when, and what a run
that stopped in any way leaves to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.checkpoint import store
from stare_megatron.config import SftConfig, parse_sft
from stare_megatron.data.supervised import BatchStream, Counts, SequenceSet
from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.sinks import open_sinks
from stare_megatron.run.folder import RunFolder
from stare_megatron.run.rates import Rates
from stare_megatron.run.stop import StopSignal
from stare_megatron.sft import batches
from stare_megatron.sft.batches import Batch, HeldOut
from stare_megatron.sft.loop import Run, held_out_is_due, learn
from stare_megatron.sft.recorder import Recorder
from stare_megatron.sft.saving import Saving
from stare_megatron.sft.session import Ranks
from stare_megatron.types import Measured, SequenceCost, UpdateStats
from stare_megatron.types.report import RankReport


def sequences() -> SequenceSet:
    """Ten of three tokens, of which two are learned; token n is of sequence n // 3."""
    return SequenceSet(
        np.arange(30, dtype=np.int32),
        np.tile([False, True, True], 10),
        np.arange(3, 33, 3),
        Counts(10, 0, 0, 0),
        "fingerprint",
    )


class CountingRanks:
    """Their state: which sequences they have learned, in order."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        self.learned: list[int] = []
        self.step = 0
        self.exports: list[Path] = []
        self._at = at

    def fit(self, batch: Batch) -> UpdateStats:
        self._at.get(self.step, lambda: None)()
        self.learned += [int(group.trajectories[0].token_ids()[0]) // 3 for group, _ in cast(Any, batch.groups)]
        self.step += 1
        tokens = sum(sum(summary.num_action_tokens) for _, summary in batch.groups)
        parts = ("update/loss", 1 / self.step), ("update/lr", 0.1), ("throughput/trained_tokens", tokens)
        return UpdateStats(tuple(Measured(*part) for part in parts))

    def held_out(self, batch: Batch) -> Measured:
        tokens = sum(sum(summary.num_action_tokens) for _, summary in batch.groups)
        return Measured("sft/held_out_loss", tokens * (10 - self.step), tokens)

    def report(self) -> list[RankReport]:
        return [RankReport((), 1 << 20, (Measured("throughput/saved", 1.0), Measured("throughput/pushed", 0.0)))]

    def memory(self) -> list[Measured]:
        return []

    def held_step(self) -> int:
        return self.step

    def begin_save(self, folder: Path, step: int, local: Path | None = None) -> None:
        folder.mkdir()
        for name in (".metadata", "metadata.json"):
            (folder / name).write_text("")
        (folder / "learned").write_text(" ".join(map(str, self.learned)))

    def save_written(self) -> bool:
        return True

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        return {}

    def restore(self, folder: Path) -> None:
        self.learned = [int(n) for n in (folder / "learned").read_text().split()]
        self.step = checkpoint.read(folder.parent).step

    def export_hf(self, folder: Path) -> None:
        self.exports.append(folder)


class NoWatch:
    step = 0

    def during(self, phase: str) -> Any:
        import contextlib

        return contextlib.nullcontext()


@dataclasses.dataclass
class Started:
    run: Run
    ranks: CountingRanks
    folder: RunFolder


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Started]:
    monkeypatch.setattr(batches.runtime, "put", lambda value: value)

    def started(*, resume: bool = False, at: dict[int, Callable[[], None]] | None = None, **tables: Any) -> Started:
        config = made(tmp_path, tables)
        folder = RunFolder(config.folder, fresh=not resume)
        folder.path.mkdir(exist_ok=True, parents=True)
        stream = BatchStream(sequences(), config)
        config = config.lasting(stream.remaining())
        found = checkpoint.find(folder.checkpoints, "auto") if resume else None
        restored = 0
        if found is not None:
            state = checkpoint.read(found)
            stream.restore(state.stream)
            restored = state.step
        ranks = CountingRanks(at or {})
        sinks = open_sinks(config.for_ranks(), folder.path, restored, True, Console(quiet=True))
        session = Ranks(cast(Any, ranks), cast(Any, NoWatch()), cast(Any, None))
        rates = Rates(SequenceCost(1.0, 0.0), 1, 0, 1, 1e12, scores=False)
        recorder = Recorder(config, session, sinks, rates)
        settings = checkpoint.Settings(config.model_dump(mode="json"), {})
        saving = Saving(config, settings, folder, cast(Any, ranks), stream, recorder, found, 1)
        held_out = HeldOut(config, config.run.steps, sequences(), sinks.log_evaluation, folder.path, restored)
        stop = StopSignal(lambda line: None)
        run = Run(config.run.steps, sequences(), stream, cast(Any, ranks), held_out, recorder, saving, stop)
        return Started(run, ranks, folder)

    return started


def made(tmp_path: Path, tables: dict[str, Any]) -> SftConfig:
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "unit", "dir": str(tmp_path)},
        "model": {"path": "m"},
        "data": {"train": ["d.jsonl"], "eval": ["e.jsonl"]},
        "sft": {"epochs": 2, "batch_sequences": 4, "max_tokens": 8},
        "checkpoint": {"every": 2, "keep_last": 9, "asynchronous": False},
        "logging": {"wandb": "disabled", "tensorboard": False},
    }
    return parse_sft({name: tree.get(name, {}) | tables.get(name, {}) for name in tree | tables}, "test")


def steps_of(table: Path) -> list[int]:
    return [int(row["step"]) for row in jsonl.read(table)] if table.exists() else []


def logged(folder: RunFolder) -> list[int]:
    return steps_of(folder.metrics)


def test_two_epochs(start: Callable[..., Started]) -> None:
    s = start()
    assert learn(s.run) == 6
    assert sorted(s.ranks.learned) == sorted([*range(10)] * 2)
    rows = jsonl.read(s.folder.metrics)
    assert [row["sft/sequences"] for row in rows] == [4, 4, 2] * 2
    assert [row["sft/tokens"] for row in rows] == [12, 12, 6] * 2
    assert [row["data/epoch"] for row in rows] == [0] * 3 + [1] * 3
    assert [row["throughput/trained_tokens_total"] for row in rows] == [8, 16, 20, 28, 36, 40]
    assert all("throughput/pushed" not in row for row in rows)
    held_out = {row["step"]: row["sft/held_out_loss"] for row in jsonl.read(s.folder.path / "eval.jsonl")}
    assert held_out == {0: 10, 3: 7, 6: 4}
    assert [store.step_of(f) for f in store.complete(s.folder.checkpoints)] == [2, 4, 6]
    assert s.ranks.exports == [s.folder.export]


def test_what_is_due_when(start: Callable[..., Started]) -> None:
    s = start(sft={"eval_every": 4}, checkpoint={"every": 0, "export_every": 5, "export_final": False})
    learn(s.run)
    assert [row["step"] for row in jsonl.read(s.folder.path / "eval.jsonl")] == [0, 4, 6]
    assert [store.step_of(f) for f in store.complete(s.folder.checkpoints)] == [6]
    assert s.ranks.exports == [s.folder.exports / "step_000005"]


@pytest.mark.parametrize("step", range(6))
def test_a_stopped_run_is_saved_and_goes_on_as_if_it_never_was(start: Callable[..., Started], step: int) -> None:
    whole = start(run={"name": "whole"})
    learn(whole.run)
    s = start(at={step: lambda: setattr(s.run.stop, "asked", True)})
    assert learn(s.run) == step + 1
    assert store.step_of(store.complete(s.folder.checkpoints)[-1]) == step + 1
    again = start(resume=True)
    assert learn(again.run) == 6
    assert again.ranks.learned == whole.ranks.learned
    assert logged(again.folder) == [1, 2, 3, 4, 5, 6]
    tables = [jsonl.read(x.folder.path / "eval.jsonl") for x in (again, whole)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_measurement_is_not_waited_for_when_an_end_is_wanted(start: Callable[..., Started], at: int) -> None:
    """It is made up for, also that of the last step, without which a run is not over."""
    whole = start(run={"name": "whole"})
    learn(whole.run)
    small = {"micro_batch_tokens": 1}  # several batches
    s = start(trainer=small)
    measure = s.ranks.held_out

    def stops(batch: Batch) -> Measured:
        s.run.stop.asked = s.ranks.step == at
        return measure(batch)

    s.ranks.held_out = stops  # type: ignore[method-assign]
    assert learn(s.run) == at
    assert held_out_is_due(s.run, at)
    assert steps_of(s.folder.path / "eval.jsonl") == [step for step in (0, 3, 6) if step < at]
    assert [store.step_of(f) for f in store.complete(s.folder.checkpoints)][-1:] == ([at] if at else [])
    again = start(trainer=small, resume=True)
    assert learn(again.run) == 6
    assert not held_out_is_due(again.run, 6)
    assert again.ranks.learned == whole.ranks.learned
    tables = [jsonl.read(x.folder.path / "eval.jsonl") for x in (again, whole)]
    assert tables[0] == tables[1]


def fail() -> None:
    raise RunError("the loss is nan")


def test_an_error_saves_the_step_before_it(start: Callable[..., Started]) -> None:
    s = start(at={3: fail})
    with pytest.raises(RunError, match="nan"):
        learn(s.run)
    assert store.step_of(store.complete(s.folder.checkpoints)[-1]) == 3


def test_a_killed_run_goes_on_from_its_newest_checkpoint(start: Callable[..., Started]) -> None:
    """What was logged and measured after it is forgotten."""
    whole = start(run={"name": "whole"})
    learn(whole.run)

    def kill() -> None:
        raise SystemExit

    s = start(at={5: kill}, checkpoint={"every": 2})
    s.ranks.held_step = lambda: -1  # type: ignore[method-assign]  # nobody answers, so that nothing is rescued
    with pytest.raises(SystemExit):
        learn(s.run)
    assert logged(s.folder) == [1, 2, 3, 4, 5]
    again = start(resume=True)
    assert learn(again.run) == 6
    assert again.ranks.learned == whole.ranks.learned
    assert logged(again.folder) == [1, 2, 3, 4, 5, 6]


def test_held_out_sequences_are_measured_in_batches_of_the_ranks_size(start: Callable[..., Started]) -> None:
    """Every one of them once, whatever the budget."""
    s = start(trainer={"micro_batch_tokens": 1})
    sizes: list[int] = []
    measure = s.ranks.held_out

    def counted(batch: Batch) -> Measured:
        sizes.append(batch.tokens)
        return measure(batch)

    s.ranks.held_out = counted  # type: ignore[method-assign]
    assert s.run.held_out.measure(cast(Any, s.ranks), 0, lambda: False) == 10
    assert sum(sizes) == 30
    assert max(sizes) <= 8
