"""The last lines of a run, however it ends: its logs, its newest checkpoint, the command that goes on."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stare_megatron import __main__ as program
from stare_megatron.errors import RunError, UserError
from stare_megatron.metrics.summary import how_to_go_on
from stare_megatron.run import train
from stare_megatron.run.forecast import Forecast
from tests.configs import configuration


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an activated environment: commands are printed by their name alone."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], Path]:
    """Lets `stare-megatron train` end in an error after a step was saved, or without one."""

    def run(error: BaseException | None, *, saved: bool = True) -> Path:
        config = configuration(run={"dir": str(tmp_path), "name": "r", "steps": 5})
        folder = train.run_folder.RunFolder(config.folder, fresh=True)
        folder.logs.mkdir(parents=True)
        if saved:
            (folder.checkpoints / "step_000003").mkdir(parents=True)
            (folder.checkpoints / "latest").write_text("step_000003\n")
        prepared = SimpleNamespace(
            config=config,
            sandbox="",
            wandb_run="",
            benchmarks=(),
            stream=SimpleNamespace(prompts=[1]),
            notes=(),
            restored=0,
        )

        def fails(*_: object) -> bool:
            if error is not None:
                raise error
            return False

        monkeypatch.setattr(train, "prepare", lambda *_: prepared)
        monkeypatch.setattr(train.run_folder, "open_run", lambda *_: folder)
        monkeypatch.setattr(train.run_folder, "parameter_count", lambda _: 1)
        monkeypatch.setattr(train, "open_sinks", lambda *_: Closed())
        monkeypatch.setattr(train.forecast, "forecast", lambda config: Forecast(config, None, 0))
        monkeypatch.setattr(train, "_run", fails)
        monkeypatch.setattr(train, "plot", lambda _: None)
        monkeypatch.setattr(train, "summarize", lambda *_: None)
        monkeypatch.setattr(train, "render", lambda *_, **__: "summary")
        monkeypatch.setattr("stare_megatron.config.load", lambda *_: config)
        return folder.path

    return run


class Closed:
    def close(self) -> None: ...


ENDS = [
    (RunError("engine 0: its process died"), 1, "stare-megatron: the run stopped: engine 0: its process died"),
    (UserError("trainer rank 0: a checkpoint of another model"), 2, "stare-megatron: trainer rank 0: a checkpoint of"),
    (KeyboardInterrupt(), 130, "stare-megatron: interrupted"),
    (
        OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
        1,
        "stare-megatron: runs/x/metrics.jsonl: its disk is full (No space left on device); free some room",
    ),
]


@pytest.mark.parametrize(("error", "code", "text"), ENDS, ids=lambda value: type(value).__name__)
def test_an_error_is_followed_by_what_is_left_and_how_to_go_on(end, capsys, error, code, text):
    folder = end(error)
    assert program.main(["train", "run.toml"]) == code
    first, *last = capsys.readouterr().err.splitlines()
    assert first.startswith(text)
    assert last == [
        f"logs       {folder}/logs",
        f"saved      {folder}/checkpoints/step_000003",
        f"resume     stare-megatron train {folder}/config.toml run.resume=auto",
    ]


@pytest.mark.parametrize(
    ("words", "where", "text"),
    [
        (["study", "study.toml"], "stare_megatron.study.command.run", "the command stopped: make.py failed"),
        (["eval", "run.toml"], "stare_megatron.run.eval.evaluate", "the evaluation stopped: make.py failed"),
    ],
)
def test_what_is_no_run_is_not_called_one(monkeypatch, capsys, words, where, text):
    def fails(*_: object, **__: object) -> None:
        raise RunError("make.py failed")

    monkeypatch.setattr("stare_megatron.config.load", lambda *_: None)
    monkeypatch.setattr(where, fails)
    assert program.main(words) == 1
    assert capsys.readouterr().err == f"stare-megatron: {text}\n"


def test_a_bug_shows_its_traceback_and_the_same_below_it(end):
    folder = end(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError) as raised:
        program.main(["train", "run.toml"])
    shown = "".join(traceback.format_exception(raised.value)).splitlines()
    assert shown[-4] == "ZeroDivisionError: a bug"
    assert shown[-1] == f"resume     stare-megatron train {folder}/config.toml run.resume=auto"


def test_without_a_checkpoint_that_is_said(end, capsys):
    folder = end(RunError("no room"), saved=False)
    assert program.main(["train", "run.toml"]) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "saved      no checkpoint was saved",
        f"start over stare-megatron train {folder}/config.toml run.resume=auto",
    ]


def test_a_run_that_was_stopped_says_it_last(end, capsys):
    folder = end(None)
    assert program.main(["train", "run.toml"]) == 130
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"train {folder}/config.toml run.resume=auto")


def test_a_longer_schedule_is_another_one_and_has_to_be_meant(tmp_path):
    config = configuration(run={"dir": str(tmp_path), "steps": 5}, trainer={"optimizer": {"schedule": "cosine"}})
    assert how_to_go_on(config, finished=True).endswith("""run.steps=10 'run.resume_allow=["run.steps"]'""")
