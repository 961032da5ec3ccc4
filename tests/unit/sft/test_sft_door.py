"""What a supervised run is told before anything is started."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stare_megatron import tasks
from stare_megatron.config import SftConfig, parse_sft
from stare_megatron.errors import UserError
from stare_megatron.sft import display, start
from stare_megatron.tasks.tiny_model import default_settings, make_model, make_tokenizer, save

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of heads of 8, which no engine on a CPU would take, with a chat template, and some rows."""
    folder = tmp_path_factory.mktemp("door")
    small = default_settings("order_free_sum", layers=1, seed=0)
    settings = dataclasses.replace(small, hidden=16, heads=2, mlp=16, max_batches=0)
    save(make_model(settings), make_tokenizer(tasks.get("order_free_sum")), folder / "model")
    rows = [{"prompt": f"{n} 2 3 4 :", "completion": "2 + 3 = 5"} for n in range(1, 11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made(material: Path, tmp_path: Path, **tables: Any) -> SftConfig:
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(tmp_path / "runs")},
        "model": {"path": str(material / "model"), "dtype": "float32"},
        "data": {"train": [str(material / "rows.jsonl")]},
        "sft": {"epochs": 3, "batch_sequences": 4, "max_tokens": 32},
    }
    return parse_sft({name: tree.get(name, {}) | tables.get(name, {}) for name in tree | tables}, "test")


def test_the_steps_are_those_of_the_epochs_or_fewer(material: Path, tmp_path: Path) -> None:
    found = start.prepare(made(material, tmp_path), CONSOLE)
    assert found.config.run.steps == found.ranks.run.steps == 9
    assert found.written.run.steps == 0
    assert found.notes == () or all("memory" in note for note in found.notes)
    text = display.opening(found.config, 1000, found.train, found.held_out)
    assert "10 rows, 10 sequences, 120 tokens, of them 60 learned; 3 epochs in batches of 4 sequences, 9 steps" in text
    for asked, steps in ((5, 5), (20, 9)):
        assert start.prepare(made(material, tmp_path, run={"steps": asked}), CONSOLE).config.run.steps == steps


REFUSED = [
    ({"data": {"train": ["nowhere.jsonl"]}}, r"data.train: .*nowhere.jsonl: cannot read it"),
    ({"data": {"eval": ["nowhere.jsonl"]}}, r"data.eval: .*nowhere.jsonl"),
    ({"sft": {"max_tokens": 4096}}, r"sft.max_tokens = 4096; .* at most 512 tokens .*: lower it"),
    ({"model": {"weights": "nowhere"}}, r"model.weights = .*not a Megatron-Core checkpoint"),
    ({"trainer": {"world_size": 3, "tensor_parallel": 3}}, r"tensor_parallel"),
    ({"data": {"messages_key": "talk", "prompt_key": "question"}}, r"rows.jsonl:1: .*no 'talk', and no 'question'"),
    ({"data": {"chat_template": True}}, r"rows.jsonl:1: .*no chat template"),
    ({"trainer": {"optimizer": {"warmup_steps": 200}}}, r"warmup_steps = 200 .*at least 200 .*the epochs are 9"),
    ({"checkpoint": {"best_metric": "sft/loss"}}, r"no metric 'sft/loss'"),
]


@pytest.mark.parametrize(("tables", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_cannot_be_is_one_line_with_the_cure(
    tables: dict[str, Any], words: str, material: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        start.prepare(made(material, tmp_path, **tables), CONSOLE)
    assert "\n" not in str(caught.value)


def test_columns_of_other_names(material: Path, tmp_path: Path) -> None:
    rows = [{"q": "1 2 3 4 :", "a": "1 + 2 = 3"}, {"q": "1 2 3 4 :", "pieces": [{"text": "9", "learn": True}]}]
    file = tmp_path / "named.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"train": [str(file)], "prompt_key": "q", "completion_key": "a", "parts_key": "pieces"}
    found = start.prepare(made(material, tmp_path, data=keys), CONSOLE).train
    assert [int(found.learn[found.place(i)].sum()) for i in range(2)] == [6, 2]


def test_what_was_cut_and_where_engines_would_not_stop_is_said(material: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (material / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    template = (
        "{% for m in messages %}<bos> {{ m.content }}{% if m.role == 'assistant' %} <pad>{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}<bos> {% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    found = start.prepare(
        made(material, tmp_path, model={"path": str(model)}, data={"chat_template": True}, sft={"max_tokens": 13}),
        CONSOLE,
    )
    assert any("answers end with '<pad>', at which an engine will not stop" in note for note in found.notes)
    found = start.prepare(made(material, tmp_path, sft={"max_tokens": 11}), CONSOLE)
    cut = "data.train: 10 sequences are longer than sft.max_tokens = 11 and were cut off there"
    assert cut in found.notes


def test_what_comes_next_begins_with_what_there_is(material: Path, tmp_path: Path) -> None:
    config = start.prepare(made(material, tmp_path), CONSOLE).config
    folder = tmp_path / "runs/run"
    assert f"train RUN.toml model.path={folder}/hf" in display.how_to_go_on(config, finished=True)
    config = start.prepare(made(material, tmp_path, checkpoint={"export_final": False}), CONSOLE).config
    assert display.how_to_go_on(config, finished=True).endswith(f"convert {folder} FOLDER")
