"""Which settings a run that goes on may have otherwise than the run before, and which it may not."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from stare_megatron import checkpoint, config
from stare_megatron.checkpoint import Settings
from stare_megatron.errors import UserError
from tests.unit.checkpoint.test_checkpoint_store import tree


@pytest.fixture
def made(tmp_path):
    """A function: the settings of a run with these overrides, and a checkpoint of the run without any."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("words")

    def settings(**changes: Any) -> Settings:
        new = tree(tmp_path)
        for key, value in changes.items():
            *path, last = key.split("__")
            node = new
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return checkpoint.settings_of(config.parse(new, "test"))

    folder = tmp_path / "step_000001"
    folder.mkdir()
    from stare_megatron.checkpoint import settings as stored

    stored.write(folder, settings())
    return settings, folder


def test_what_may_change_does(made, tmp_path):
    settings, folder = made
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    new = settings(
        run__steps=9,
        run__name="other",
        run__resume="auto",
        model__path=str(tmp_path / "moved"),
        data__train=["copy.jsonl"],
        trainer__world_size=2,
        trainer__tensor_parallel=2,
        inference__engines=2,
        checkpoint__every=5,
        logging__wandb="disabled",
        eval={"every": 2, "benchmarks": ["b.jsonl"]},
        cluster__object_store_mb=100,
    )
    checkpoint.check_settings(folder, new, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run__seed": 4}, "run.seed was 0, is 4"),
        ({"trainer__optimizer": {"lr": 0.5}}, "trainer.optimizer.lr was 1e-06, is 0.5"),
        ({"algorithm__stare": {"fraction": 0.25}}, "algorithm.stare.fraction was 0.1, is 0.25"),
        ({"algorithm__method": "grpo"}, 'algorithm.method was "stare", is "grpo"; set'),
        ({"rollout__group_size": 4}, "rollout.group_size was 8, is 4"),
        ({"reward__name": "exact"}, 'reward.name was "math", is "exact"'),
        ({"data__shuffle": False}, "data.shuffle was true, is false"),
        ({"model__dtype": "float32"}, 'model.dtype was "bfloat16", is "float32"'),
        ({"trainer__megatron": {"softmax_scale": 0.5}}, "trainer.megatron.softmax_scale was not set, is 0.5"),
    ],
)
def test_other_settings_are_refused_by_name_and_may_be_meant(made, changes, said):
    settings, folder = made
    new = settings(**changes)
    with pytest.raises(UserError) as refused:
        checkpoint.check_settings(folder, new, [])
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    allowed = json.loads(message.partition("run.resume_allow=")[2])
    checkpoint.check_settings(folder, new, allowed)
    checkpoint.check_settings(folder, new, [key.partition(".")[0] for key in allowed])


def test_a_schedule_over_the_length_of_the_run_holds_the_length(made, tmp_path):
    settings, _ = made
    folder = tmp_path / "cosine"
    folder.mkdir()
    from stare_megatron.checkpoint import settings as stored

    stored.write(folder, settings(trainer__optimizer={"schedule": "cosine"}))
    with pytest.raises(UserError, match=r"run\.steps was 3, is 9"):
        checkpoint.check_settings(folder, settings(trainer__optimizer={"schedule": "cosine"}, run__steps=9), [])


@pytest.mark.parametrize(("file", "what"), [("config.json", "model"), ("tokenizer.json", "tokenizer")])
def test_another_model_or_tokenizer_is_refused(made, tmp_path, file, what):
    settings, folder = made
    (tmp_path / "model" / file).write_text("other")
    with pytest.raises(UserError, match=f"made with another {what}: {file} of model.path"):
        checkpoint.check_settings(folder, settings(), [])
    checkpoint.check_settings(folder, settings(), ["model.path"])


def test_an_unknown_name_in_resume_allow_is_refused(made):
    settings, folder = made
    with pytest.raises(UserError, match=r"run\.resume_allow: 'run\.sead' is no key"):
        checkpoint.check_settings(folder, settings(), ["run.sead"])


def test_a_key_that_came_later_counts_with_its_default(made):
    settings, folder = made
    tree = json.loads((folder / "settings.json").read_text())
    del tree["config"]["rollout"]["top_p"]
    tree["config"]["rollout"]["gone"] = None
    (folder / "settings.json").write_text(json.dumps(tree))
    checkpoint.check_settings(folder, settings(), [])
    with pytest.raises(UserError, match=r"rollout\.top_p was 1\.0, is 0\.5"):
        checkpoint.check_settings(folder, settings(rollout__top_p=0.5), [])
