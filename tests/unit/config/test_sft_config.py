"""The configuration of supervised training: its own keys, those that it shares, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stare_megatron import __main__, config
from stare_megatron.checkpoint import settings
from stare_megatron.config import SftConfig, all_keys, load_sft, parse_sft
from stare_megatron.config.describe import describe
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml
from tests.configs import configuration


def made(**changes: dict[str, Any]) -> SftConfig:
    tree: dict[str, dict[str, Any]] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}
    return parse_sft({name: tree.get(name, {}) | changes.get(name, {}) for name in tree | changes}, "test")


REFUSED = [
    ({"sft": {"epoch": 2}}, r"unknown key 'sft.epoch'; did you mean 'sft.epochs'"),
    ({"rollout": {"group_size": 4}}, r"unknown key 'rollout'"),
    ({"trainer": {"scoring": "rollout"}}, r"trainer.scoring = 'rollout' does nothing in supervised training"),
    ({"trainer": {"updates_per_batch": 2}}, r"trainer.updates_per_batch = 2 .*set sft.batch_sequences"),
    ({"trainer": {"offload": ["parameters"]}}, r'"parameters".*take it out'),
    ({"logging": {"samples_every": 3}}, r"logging.samples_every = 3 does nothing"),
    (
        {"checkpoint": {"local": "/nvme"}},
        r"checkpoint.local = '/nvme' does nothing in supervised training",
    ),
    ({"sft": {"eval_every": 5}}, r"sft.eval_every = 5, and data.eval names no file"),
    ({"sft": {"batch_tokens": 9000, "batch_sequences": 8}}, r"both set; choose one"),
    ({"sft": {"batch_tokens": 100}}, r"sft.batch_tokens = 100 is less than one sequence, sft.max_tokens = 4096"),
    ({"run": {"steps": 200}, "trainer": {"optimizer": {"warmup_steps": 300}}}, r"warmup_steps = 300"),
    ({"sft": {"overlong": "cut"}}, r"sft.overlong = 'cut'"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_would_do_nothing_or_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(**changes)


def test_every_key_has_a_meaning_and_shared_ones_are_those_of_train() -> None:
    mine, theirs = all_keys(root=SftConfig), all_keys()
    assert [key for key, meaning in mine.items() if not meaning.strip()] == []
    for table in ("model", "trainer", "checkpoint", "logging", "cluster", "watchdog"):
        own = {key: meaning for key, meaning in mine.items() if key.startswith(f"{table}.")}
        assert own == {key: meaning for key, meaning in theirs.items() if key.startswith(f"{table}.")}
    assert "sft.overlong" in describe("sft")


def test_the_ranks_get_the_settings_of_a_run_without_engines() -> None:
    one = made(
        run={"name": "x", "seed": 7, "restarts": 1},
        sft={"max_tokens": 333},
        trainer={"world_size": 4, "tensor_parallel": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 3}},
        checkpoint={"every": 9},
        cluster={"port": 1234},
    )
    ranks = one.lasting(40).for_ranks()
    assert (ranks.run.steps, ranks.run.seed, ranks.run.restarts, ranks.folder) == (40, 7, 1, one.folder)
    assert (ranks.window, ranks.inference.engines, ranks.algorithm.reduction) == (333, 0, "token-mean")
    for table in ("model", "trainer", "checkpoint", "logging", "cluster", "watchdog"):
        assert ranks.__dict__[table] == one.__dict__[table]


def test_files_include_others_and_the_record_of_a_run_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[model]\npath = "m"\n[sft]\nepochs = 5\nmax_tokens = 64\n')
    (tmp_path / "sft.toml").write_text('include = "base.toml"\n[data]\ntrain = ["d.jsonl"]\n[sft]\nepochs = 2\n')
    read = load_sft(tmp_path / "sft.toml", ["sft.batch_tokens=128"])
    assert (read.sft.epochs, read.sft.max_tokens, read.sft.batch_tokens) == (2, 64, 128)
    (tmp_path / "again.toml").write_text(to_toml(read))
    assert load_sft(tmp_path / "again.toml", []) == read


def test_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sft.toml").write_text('model.path = "m"\ndata.train = "d.jsonl"\n')
    assert __main__.main(["sft", str(tmp_path / "sft.toml"), "--print-config", "sft.epochs=3"]) == 0
    assert "epochs = 3" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["tool_use_7b/sft.toml"])
def test_examples_are_valid(example: str) -> None:
    assert load_sft(Path(__file__).parents[3] / "examples" / example, []).sft.epochs


def kept(tmp_path: Path, of: SftConfig | config.Config) -> Path:
    settings.write(tmp_path, settings.Settings(of.model_dump(mode="json"), {}))
    return tmp_path


def now(of: SftConfig | config.Config) -> settings.Settings:
    return settings.Settings(of.model_dump(mode="json"), {})


def test_a_resumed_run_may_change_what_is_free_only(tmp_path: Path) -> None:
    folder = kept(tmp_path, made().lasting(10))
    settings.check_settings(folder, now(made(checkpoint={"every": 3}, data={"eval": "e.jsonl"}).lasting(10)), [])
    settings.check_settings(folder, now(made(sft={"epochs": 4}).lasting(40)), [])  # the rate is constant
    for changes, key in (
        ({"sft": {"batch_sequences": 5}}, "sft.batch_sequences"),
        ({"sft": {"max_tokens": 5}}, "sft.max_tokens"),
        ({"data": {"chat_template": True}}, "data.chat_template"),
        ({"trainer": {"optimizer": {"lr": 0.5}}}, "trainer.optimizer.lr"),
    ):
        other = now(made(**changes).lasting(10))
        with pytest.raises(UserError, match=rf"{key} was .*resume_allow=\[\"{key}\"\]"):
            settings.check_settings(folder, other, [])
        settings.check_settings(folder, other, [key])


def test_a_schedule_is_another_one_when_the_length_changes(tmp_path: Path) -> None:
    cosine = {"trainer": {"optimizer": {"schedule": "cosine"}}}
    folder = kept(tmp_path, made(**cosine).lasting(10))
    with pytest.raises(UserError, match=r"run.steps was 10, is 20"):
        settings.check_settings(folder, now(made(**cosine).lasting(20)), [])


def test_a_checkpoint_of_train_is_none_of_sft_nor_the_reverse(tmp_path: Path) -> None:
    folder = kept(tmp_path, made().lasting(10))
    with pytest.raises(UserError, match=r"a checkpoint of `sft`, which `train` cannot resume.*model.path.*hf/"):
        settings.check_settings(folder, now(configuration()), [])
    folder = kept(tmp_path, configuration())
    with pytest.raises(UserError, match=r"a checkpoint of `train`, which `sft` cannot resume"):
        settings.check_settings(folder, now(made().lasting(10)), [])
