"""A chat template that writes today's date: the run's prompts keep the date of its first start."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers.utils import chat_template_utils

from stare_megatron import checkpoint
from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import LoopState, store
from stare_megatron.config import parse
from stare_megatron.errors import UserError
from stare_megatron.run import train
from stare_megatron.run.eval import find_policy
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from stare_megatron.types import UNOBSERVED, GateDuty

DATED = "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }} {% endfor %}"


class Today(datetime.datetime):
    """The clock of transformers and of the run."""

    day = datetime.datetime(2026, 11, 27)

    @classmethod
    def now(cls, tz=None):
        return cls.day

    @classmethod
    def today(cls):
        return cls.day.date()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares a run on a day of November 2026."""
    made = tmp_path / "made"
    make(dataclasses.replace(default_settings("order_free_sum", layers=2, seed=0), max_batches=0), made, 16, 4)
    (made / "model" / "chat_template.jinja").write_text(DATED)
    row = {"id": "a", "prompt": [{"role": "user", "content": "3 4 5 6 :"}], "answer": "18"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    monkeypatch.setattr(train, "datetime", SimpleNamespace(date=Today))

    def run(day: int, date: str = "") -> train.Prepared:
        Today.day = datetime.datetime(2026, 11, day)
        config = parse(
            {
                "run": {"dir": str(tmp_path), "name": "r", "steps": 5, "resume": "auto"},
                "model": {"path": str(made / "model"), "dtype": "float32"},
                "data": {"train": [str(tmp_path / "train.jsonl")], "max_prompt_tokens": 16, "date": date},
                "reward": {"name": "exact"},
                "rollout": {"max_response_tokens": 16},
            },
            "test",
        )
        return train.prepare(config, Console(quiet=True))

    return run


def save(prepared: train.Prepared) -> Path:
    root = prepared.config.folder / "checkpoints"
    state = LoopState(3, 9, prepared.stream.state(), ControllerState(1.0, 1.0), UNOBSERVED, GateDuty(3, 1), "")
    partial = store.begin(root, state, prepared.settings)
    (partial / store.TRAINER).mkdir()
    for name in (".metadata", "metadata.json"):
        (partial / store.TRAINER / name).write_text("x")
    return store.finish(root, 3, {})


def test_a_run_is_resumed_tomorrow_with_the_prompts_of_today(start, monkeypatch):
    first = start(27)
    assert first.config.data.date == "2026-11-27"
    assert first.stream.prompts[0].text.startswith("27 ")
    saved = save(first)
    read: list[str] = []
    settings_of = checkpoint.settings_of
    monkeypatch.setattr(checkpoint, "settings_of", lambda config: read.append(config.run.name) or settings_of(config))
    second = start(28)
    assert read == ["r"]  # files of a model are summed once
    assert second.settings.config["data"]["date"] == "2026-11-27"
    assert (second.resume_from, second.restored) == (saved, 3)
    assert second.stream.prompts[0] == first.stream.prompts[0]
    assert second.config.data.date == "2026-11-27"
    with pytest.raises(UserError, match=r'data\.date was "2026-11-27", is "2026-11-28"'):
        start(28, date="2026-11-28")


def test_an_evaluation_of_the_run_has_its_date(start):
    prepared = start(27)
    saved = save(prepared)
    config = prepared.config.model_copy(update={"data": prepared.config.data.model_copy(update={"date": ""})})
    for policy in (find_policy(config, saved), find_policy(config, config.folder / "checkpoints" / "step_000003")):
        assert checkpoint.with_date(config, policy.run).data.date == "2026-11-27"
    assert checkpoint.with_date(config, find_policy(config, None).run).data.date == ""


def test_a_checkpoint_from_before_goes_on_as_it_did(start):
    """On its day it can; the date is kept from then on."""
    first = start(27)
    old = dataclasses.replace(first, settings=dataclasses.replace(first.settings, config=dict(first.settings.config)))
    del (data := dict(old.settings.config["data"]))["date"]
    old.settings.config["data"] = data
    save(old)
    again = start(27)
    assert (again.restored, again.config.data.date) == (3, "2026-11-27")


def test_a_template_without_a_date_needs_none(start, tmp_path):
    (tmp_path / "made/model/chat_template.jinja").write_text(DATED.replace("strftime_now('%d')", "'x'"))
    assert start(27).config.data.date == ""
