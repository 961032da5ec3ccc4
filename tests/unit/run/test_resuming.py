"""A run whose newest checkpoint lies on the nodes' own disks: chosen at the door, looked at when there are ranks."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, Settings, local, store
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import MissingFilesError
from stare_megatron.run import resuming, train
from stare_megatron.types import GateDuty, Observed
from tests.configs import configuration
from tests.unit.run.test_recovery import Run, Sinks, Stream


def saved(root: Path, step: int) -> None:
    """A whole checkpoint of a rank, in `root`, on a node's disk if that is called `local`."""
    stream = StreamState(0, step, 3, "f")
    state = LoopState(step, 7, stream, ControllerState(1.0, 1.0), Observed(0.5, 0.0), GateDuty(7, 3), "")
    partial = store.begin(root, state, Settings({}, {}))
    if root.name == store.LOCAL:
        local.write_place(partial, local.Place(root, 1))
    (partial / store.TRAINER).mkdir()
    for name in (".metadata", "metadata.json"):
        (partial / store.TRAINER / name).write_text("x")
    store.finish(root, step, {})


class Ranks:
    """`lost`: what a node has no more of, by step."""

    def __init__(self, lost: dict[int, str]) -> None:
        self.lost = lost
        self.contents: list[bool] = []

    def room(self, home: Path) -> list[tuple[str, int]]:
        return [("here", 0)]

    def fault(self, folder: Path, *, contents: bool) -> str:
        self.contents.append(contents)
        return self.lost.get(store.step_of(folder), "")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts a run of 10 steps with durable checkpoints 4, local ones 6 and 8, and this lost: what it trained."""

    def go(lost: dict[int, str], unreadable: set[str], durable: bool = True) -> Any:
        newest, read, ahead = checkpoint.newest, checkpoint.read, checkpoint.read_ahead
        made = Run(tmp_path, monkeypatch, [], set())
        for name, real in (("newest", newest), ("read", read), ("read_ahead", ahead)):
            monkeypatch.setattr(train.checkpoint, name, real)
        ranks, trains = Ranks(lost), made.train
        lookout = SimpleNamespace(step=0, watching=contextlib.nullcontext)
        restart = functools.partial(made.sinks.notes.append, "ranks are started again")
        session = SimpleNamespace(trainers=ranks, lookout=lookout, restart_trainers=restart)
        monkeypatch.setattr(train, "open_session", lambda *_, **__: contextlib.nullcontext(session))

        def restore_and_train(parts: SimpleNamespace) -> int:
            prepared = parts.prepared
            if prepared.resume_from is not None and prepared.resume_from.name in unreadable:
                raise MissingFilesError("rank 1 has no __0_0.distcp")
            made.resumed = prepared.resume_from
            return trains(prepared)

        monkeypatch.setattr(train.loop, "train", restore_and_train)
        root = made.folder.checkpoints
        for step in (6, 8):
            saved(root / "local", step)
        if durable:
            saved(root, 4)
        config = configuration(run={"dir": str(tmp_path), "name": "r", "steps": 10, "resume": "auto"})
        found = resuming.find(config, Console(file=io.StringIO()))
        assert found == root / "local/step_000008"
        prepared = train.Prepared(*(config, None, None, made.stream, (), None, 0, None, "", "", ()))  # pyright: ignore
        prepared = resuming.at(prepared, found, checkpoint.read(found))
        assert train._run(prepared, made.folder, made.sinks)  # pyright: ignore
        made.ranks, made.root = ranks, root
        return made

    return go


def first(made: Any) -> tuple[Path | None, tuple[int, int], list[int]]:
    """What it went on from; the first step trained and its place in the prompts; to which steps the record was cut."""
    assert all(step == cursor for step, cursor in made.trained)
    return made.resumed and made.resumed.relative_to(made.root).as_posix(), made.trained[0], made.sinks.rewound


def test_the_nodes_have_it(run: Any) -> None:
    made = run({}, set())
    assert first(made) == ("local/step_000008", (9, 9), [])
    assert made.ranks.contents == [True]


@pytest.mark.parametrize(
    ("lost", "unreadable", "source", "cuts"),
    [
        ({8: "gone"}, set(), "local/step_000006", [6]),
        ({8: "gone", 6: "gone"}, set(), "step_000004", [4]),
        ({}, {"step_000008"}, "local/step_000006", [6]),
        ({6: "gone"}, {"step_000008"}, "step_000004", [4]),
        ({8: "gone"}, {"step_000006"}, "step_000004", [6, 4]),
    ],
)
def test_else_an_older_one(run: Any, lost: Any, unreadable: Any, source: str, cuts: list[int]) -> None:
    made = run(lost, unreadable)
    assert first(made) == (source, (cuts[-1] + 1,) * 2, cuts)
    assert f"going on from {made.root / source}" in made.sinks.notes[-1]


def test_with_nothing_else_it_starts_over(run: Any) -> None:
    made = run({8: "trainer rank 0: gone", 6: "gone"}, set(), durable=False)
    assert first(made) == (None, (1, 1), [0])
    assert made.sinks.notes[-1].endswith("is not whole: step_000008: trainer rank 0: gone")
    assert checkpoint.newest_first(made.root) == [], "what cannot be gone on from is no choice again"


def test_who_starts_over_after_a_load_that_was_refused_has_new_ranks(run: Any) -> None:
    made = run({6: "gone"}, {"step_000008"}, durable=False)
    assert first(made) == (None, (1, 1), [0])
    assert made.sinks.notes[-1] == "ranks are started again"


def test_ranks_that_cannot_read_a_durable_one_end_the_run(run: Any) -> None:
    with pytest.raises(MissingFilesError, match="has no"):
        run({8: "gone", 6: "gone"}, {"step_000004"})


def test_of_ranks_that_come_back_sizes_are_compared(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    saved(root / "local", 6)
    ranks, stream, sinks = Ranks({}), Stream(), Sinks()
    choice = resuming.Choice(root, stream.state(), sinks.note)
    prepared = train.Prepared(*(None, None, None, stream, (), None, 0, None, "", "", ()))  # pyright: ignore
    found = choice.last(prepared, SimpleNamespace(trainers=ranks))  # pyright: ignore
    assert (found.restored, found.resume_from, stream.at.cursor) == (6, root / "local/step_000006", 6)
    assert ranks.contents == [False]
