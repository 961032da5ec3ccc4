"""Which policy `eval` takes, and where what it finds goes."""

from __future__ import annotations

import os

import pytest

from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.run.eval import find_policy, results_folder
from tests.configs import configuration


@pytest.fixture
def config(tmp_path):
    run = tmp_path / "runs" / "trained"
    for folder in ("hf", "checkpoints/step_000040/trainer", "exports/step_000020"):
        (run / folder).mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "checkpoints/latest").write_text("step_000040\n")
    (run / "checkpoints/step_000040/loop.json").write_text("{}")
    return configuration(run={"dir": str(tmp_path / "runs"), "name": "wide"})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "wide-eval"),
        ("trained", "trained-eval"),
        ("trained/hf", "trained-eval"),
        ("trained/checkpoints/step_000040", "trained-step_000040-eval"),
        ("trained/exports/step_000020", "trained-step_000020-eval"),
        ("Qwen3-8B", "Qwen3-8B-eval"),
    ],
)
def test_results_go_by_the_name_of_what_is_evaluated(config, model, name):
    """Two models under one configuration: the second does not want the folder of the first."""
    runs = config.folder.parent
    assert results_folder(config, model and runs / model) == runs / name


def test_a_folder_near_the_one_that_is_meant_is_told_it(config):
    run = config.folder.parent / "trained"
    with pytest.raises(UserError, match=r"nowhere: no such folder; give a run's"):
        find_policy(config, run / "nowhere")
    for path, meant in (
        ("checkpoints", "its newest checkpoint is"),
        ("checkpoints/step_000040/trainer", "the checkpoint is"),
    ):
        with pytest.raises(UserError, match=rf"neither a Hugging Face .*; {meant} {run}/checkpoints/step_000040$"):
            find_policy(config, run / path)


def test_a_run_that_went_on_after_its_export_is_evaluated_where_it_is(config):
    run = config.folder.parent / "trained"
    for folder, second in (("checkpoints/step_000040", 1000), ("hf", 1001)):
        (run / folder / "config.json").write_text("{}")
        manifest.write(run / folder)
        os.utime(run / folder / manifest.NAME, (second, second))
    assert find_policy(config, run).model == run / "hf"
    os.utime(run / "hf" / manifest.NAME, (999, 999))
    with pytest.raises(UserError, match=r"step_000040/loop\.json"):  # it is read, and there is nothing in it
        find_policy(config, run)
