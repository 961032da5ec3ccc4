"""Trainer ranks that are lost: the run goes on from its last checkpoint, within itself."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stare_megatron import __main__ as program
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import EngineLostError, GroupsLostError, HangError, LostError, RanksLostError
from stare_megatron.run import train
from tests.configs import configuration

START = StreamState(0, 0, 3, "f")


class Stream:
    def __init__(self) -> None:
        self.at = START

    def state(self) -> StreamState:
        return self.at

    def restore(self, state: StreamState) -> None:
        self.at = state


class Sinks:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rewound: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None: ...

    def rewind(self, step: int) -> None:
        self.rewound.append(step)


class Run:
    """Steps, each of which takes a prompt, with a loss of ranks after some; `saves`: step -> what is on disk then."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[int], saves: set[int]) -> None:
        self.config = configuration(run={"dir": str(tmp_path), "name": "r", "steps": 10})
        self.folder = train.run_folder.RunFolder(self.config.folder, fresh=True)
        self.folder.path.mkdir(parents=True)
        self.losses, self.saves = losses, saves
        self.error: Exception = RanksLostError("trainer rank 1: its process died")
        self.sinks, self.stream, self.restarts = Sinks(), Stream(), 0
        self.trained: list[tuple[int, int]] = []  # step, place in the prompts
        self.saved: dict[str, StreamState] = {}
        monkeypatch.setattr(train, "open_session", self.session)
        evaluations = SimpleNamespace(due=lambda step: False)
        parts = functools.partial(SimpleNamespace, evaluations=evaluations)
        monkeypatch.setattr(train, "_assemble", lambda prepared, *_: parts(prepared=prepared))
        monkeypatch.setattr(train.loop, "train", lambda run: self.train(run.prepared))
        monkeypatch.setattr(train.sizing, "rollout_load", lambda _: None)
        monkeypatch.setattr(train.checkpoint, "newest", self.newest)
        monkeypatch.setattr(train.checkpoint, "read", self.read)
        monkeypatch.setattr(train.checkpoint, "read_ahead", lambda _: None)

    @contextlib.contextmanager
    def session(self, *_: Any, **__: Any):
        def restart() -> None:
            self.restarts += 1

        lookout = SimpleNamespace(step=0, watching=contextlib.nullcontext)
        yield SimpleNamespace(restart_trainers=restart, lookout=lookout, trainers="the ranks")

    def train(self, prepared: train.Prepared) -> int:
        for step in range(prepared.restored + 1, 11):
            cursor = self.stream.at.cursor + 1
            self.stream.at = StreamState(0, cursor, 3, "f")
            self.trained.append((step, cursor))
            if self.losses and self.losses[0] == step:
                self.losses.pop(0)
                raise self.error
            if step in self.saves:
                self.saved[f"step_{step:06d}"] = self.stream.at
        return 10

    def newest(self, root: Path, disks: Any, *, contents: bool, say: Any, unreadable: dict[Path, str]) -> Path | None:
        assert disks == "the ranks"
        assert not contents
        return root / max(self.saved) if self.saved else None

    def read(self, folder: Path) -> Any:
        return SimpleNamespace(step=int(folder.name[-6:]), stream=self.saved[folder.name])

    def go(self) -> bool:
        prepared = train.Prepared(
            *(self.config, None, None, self.stream, (), None, 0, None, "", "", ()),  # pyright: ignore
        )
        return train._run(prepared, self.folder, self.sinks)  # pyright: ignore

    def events(self) -> list[tuple[str, str]]:
        return [(row["old"], row["new"]) for row in self.rows() if row["who"] == "trainer ranks"]

    def rows(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder.path / "events.jsonl").read_text().splitlines()]

    def of_the_run(self) -> list[tuple[str, str]]:
        return [(row["new"], row["reason"]) for row in self.rows() if row["who"] == "run"]


def test_it_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, losses=[6, 9], saves={2, 4, 8})
    assert run.go()
    assert run.sinks.rewound == [4, 8]
    assert run.restarts == 2
    # Each step is trained on its own prompts, whichever time it is done.
    assert all(step == cursor for step, cursor in run.trained)
    assert [step for step, _ in run.trained] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 9, 10]
    assert run.events() == [("HEALTHY", "DEAD"), ("DEAD", "RESTARTING"), ("RESTARTING", "HEALTHY")] * 2
    assert run.of_the_run() == [
        *(("RESUMED", f"going on from step {step}, {run.folder.checkpoints / f'step_00000{step}'}") for step in (4, 8)),
        ("ENDED", "10 of 10 steps are done"),
    ]
    assert "trainer ranks: HEALTHY -> DEAD: trainer rank 1: its process died" in run.sinks.notes
    assert "trainer ranks: RESTARTING -> HEALTHY: going on from step 4" in run.sinks.notes


def test_without_a_checkpoint_it_begins_again(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, losses=[3], saves=set())
    assert run.go()
    assert run.sinks.rewound == [0]
    assert run.trained[:4] == [(1, 1), (2, 2), (3, 3), (1, 1)]


def test_groups_that_a_lost_node_had_are_sampled_again_from_there(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, losses=[6], saves={2, 5})
    run.error = GroupsLostError("trainer rank 1: a group of the batch is lost with its node")
    assert run.go()
    assert run.sinks.rewound == [5]
    assert run.trained[4:7] == [(5, 5), (6, 6), (6, 6)]
    assert any("going on from step 5" in note for note in run.sinks.notes)


@pytest.mark.parametrize(("restarts", "losses"), [(0, [3]), (1, [3, 3]), (2, [3, 3, 3])])
def test_restarts_are_limited(tmp_path, monkeypatch, restarts, losses):
    run = Run(tmp_path, monkeypatch, losses=losses, saves={2})
    run.config = configuration(run={"dir": str(tmp_path), "name": "r", "steps": 10, "restarts": restarts})
    with pytest.raises(RanksLostError, match="trainer rank 1: its process died"):
        run.go()
    assert run.restarts == restarts
    assert run.of_the_run()[-1] == ("FAILED", "trainer rank 1: its process died")


@pytest.mark.parametrize(("culprits", "outlived"), [(("trainer rank 1",), True), ((), False)])
def test_a_hang_whose_culprits_were_ended_is_a_loss(tmp_path, monkeypatch, culprits, outlived):
    run = Run(tmp_path, monkeypatch, losses=[3], saves={2})
    run.error = HangError("trainer rank 0: no answer within 120 s", culprits)
    with contextlib.nullcontext() if outlived else pytest.raises(HangError):
        assert run.go()
    assert run.restarts == outlived


@pytest.mark.parametrize("error", [LostError, EngineLostError, RanksLostError])
def test_a_scheduler_can_tell_what_is_worth_another_try(monkeypatch, capsys, error):
    def fails(*_: object) -> int:
        raise error("trainer rank 1: its process died")

    monkeypatch.setattr(program, "_train", fails)
    assert program.main(["train", "run.toml"]) == 75
    assert "the run stopped: trainer rank 1: its process died" in capsys.readouterr().err
