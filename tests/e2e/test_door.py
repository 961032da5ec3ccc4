"""Bad input at the command line: one clear line, exit code 2, nothing half-written. In one process: quick.

`tests/unit/run/test_preflight.py` and `test_run_folder.py` hold the wider list of refusals.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from stare_megatron.__main__ import main
from stare_megatron.config.methods import METHODS
from stare_megatron.host.program import called
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests.contracts.source import ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import dataclasses

    folder = tmp_path_factory.mktemp("door") / "made"
    make(dataclasses.replace(default_settings("order_free_sum", layers=2, seed=0), max_batches=0), folder, 16, 4)
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path


def refused(files: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that `train` says."""
    config = files / "run.toml"
    config.write_text(
        f'[run]\nsteps = 1\ndir = "{files / "runs"}"\n[model]\npath = "{files / "made/model"}"\ndtype = "float32"\n'
        f'[data]\ntrain = ["{files / "made/train.jsonl"}"]\nmax_prompt_tokens = 8\n'
        '[reward]\nname = "order_free_sum"\n[rollout]\nmax_response_tokens = 24\n[logging]\nwandb = "disabled"\n'
    )
    code = main(["train", str(config), *overrides])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert not (files / "runs").exists() or not list((files / "runs").iterdir())
    return err


def edit_config(files: Path, **changes: object) -> None:
    path = files / "made/model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_key(files, capsys):
    err = refused(files, capsys, "trainer.tensor_paralel=2")
    assert "trainer.tensor_paralel" in err
    assert "'trainer.tensor_parallel'" in err


def test_missing_configuration_file(tmp_path, capsys):
    assert main(["train", str(tmp_path / "nowhere.toml")]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


def test_missing_data_file(files, capsys):
    assert "nowhere.jsonl" in refused(files, capsys, f'data.train=["{files / "nowhere.jsonl"}"]')


def test_a_model_of_the_hub_names_the_command_that_fetches_it(files, capsys):
    assert "hf download Qwen/Nowhere-1B" in refused(files, capsys, "model.path=Qwen/Nowhere-1B")


def test_a_resume_that_is_no_checkpoint(files, capsys):
    assert "/yes': neither never, auto nor" in refused(files, capsys, "run.resume=yes")


def test_a_refusal_of_wandb_leaves_no_folder(files, capsys, monkeypatch):
    import wandb

    def init(**_):
        raise wandb.Error("no API key configured")

    monkeypatch.setattr(wandb, "init", init)
    assert "no API key configured" in refused(files, capsys, "logging.wandb=online")


def test_malformed_jsonl_names_file_and_line(files, capsys):
    path = files / "made/train.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-3]
    path.write_text("\n".join(lines))
    assert "train.jsonl:7:" in refused(files, capsys)


def test_empty_data_set(files, capsys):
    (files / "made/train.jsonl").write_text("\n\n")
    err = refused(files, capsys)
    assert "train.jsonl" in err
    assert "empty" in err


def test_unsupported_architecture(files, capsys):
    edit_config(files, architectures=["MambaForCausalLM"], model_type="mamba")
    err = refused(files, capsys)
    assert "config.json" in err
    assert "mamba" in err.lower()


def test_a_configuration_that_is_not_of_the_weights(files, capsys):
    edit_config(files, vocab_size=64)
    err = refused(files, capsys)
    assert "model.embed_tokens.weight" in err
    assert "config.json asks for [64, " in err


def test_impossible_layout(files, capsys):
    err = refused(files, capsys, "trainer.world_size=4", "trainer.tensor_parallel=4")
    assert "tensor_parallel" in err
    assert "4" in err


def test_overlong_prompts_refused_by_setting(files, capsys):
    err = refused(files, capsys, "data.max_prompt_tokens=4", "data.overlong_prompts=refuse")
    assert "train.jsonl:1:" in err
    assert "data.max_prompt_tokens" in err


def test_port_in_use(files, capsys):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        assert f"cluster.port = {port}" in refused(files, capsys, f"cluster.port={port}")


def test_no_disk_space(files, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    err = refused(files, capsys)
    assert "run.dir" in err
    assert "MB free" in err


def benchmarks(*paths: Path) -> str:
    return f"eval.benchmarks={json.dumps([str(p) for p in paths])}"


def test_missing_benchmark(files, capsys):
    err = refused(files, capsys, benchmarks(files / "nowhere.jsonl"))
    assert "eval.benchmarks" in err
    assert "nowhere.jsonl" in err


def test_malformed_benchmark_names_file_and_line(files, capsys):
    path = files / "made/eval.jsonl"
    path.write_text(path.read_text() + "{}\n")
    assert "eval.jsonl:5: no key 'prompt'" in refused(files, capsys, benchmarks(path))


def test_benchmark_prompts_longer_than_the_window(files, capsys):
    err = refused(files, capsys, benchmarks(files / "made/eval.jsonl"), "eval.max_response_tokens=30")
    assert "eval.jsonl" in err
    assert "window of 32" in err


def test_benchmarks_of_one_name(files, capsys):
    path = files / "made/eval.jsonl"
    assert "both called 'eval'" in refused(files, capsys, benchmarks(path, path))


def alone(files: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `eval` says."""
    refused(files, capsys, "rollout.group_size=1")  # writes run.toml
    code = main(["eval", str(files / "run.toml"), *arguments])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert not list(files.glob("**/*.partial"))
    return err


def test_evaluation_alone_without_a_benchmark(files, capsys):
    assert "eval.benchmarks is empty" in alone(files, capsys)


def test_evaluation_alone_of_nothing(files, capsys):
    held_out = benchmarks(files / "made/eval.jsonl")
    assert "nowhere: no such folder" in alone(files, capsys, held_out, "--model", str(files / "nowhere"))
    assert "neither a Hugging Face folder" in alone(files, capsys, held_out, "--model", str(files / "made"))
    (files / "run").mkdir()
    (files / "run/run.json").write_text("{}")
    assert "neither exported a policy nor saved" in alone(files, capsys, "--model", str(files / "run"), held_out)
    assert "nowhere.jsonl" in alone(files, capsys, benchmarks(files / "nowhere.jsonl"))


def test_evaluation_alone_writes_into_nobodys_folder(files, capsys):
    held_out = benchmarks(files / "made/eval.jsonl")
    assert "made: exists" in alone(files, capsys, held_out, "--out", str(files / "made"))
    assert (files / "made/eval.jsonl").exists()


def test_options_after_overrides_and_before(files, capsys):
    """argparse alone refuses `train FILE --quiet key=value`."""
    assert "rollout.group_size" in refused(files, capsys, "--quiet", "rollout.group_size=1")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(files / "run.toml"), "--loud"])
    assert stopped.value.code == 2


def test_print_config_shows_every_resolved_key(files, capsys):
    refused(files, capsys, "rollout.group_size=1")
    assert main(["train", str(files / "run.toml"), "--print-config", "rollout.group_size=16"]) == 0
    out = capsys.readouterr().out
    assert "group_size = 16" in out
    assert "target_entropy = 0.3" in out


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_keys_and_methods_are_explained(capsys):
    assert said(capsys, "config", "checkpoint.every").startswith(
        "checkpoint.every (integer; default 25)\n    Save every"
    )
    assert "run.steps (integer; required)" in said(capsys, "config", "run")
    assert "[trainer]  " in said(capsys, "config")
    assert main(["config", "trainer.tensor_paralel"]) == 2
    assert "did you mean 'trainer.tensor_parallel'?" in capsys.readouterr().err
    lines = said(capsys, "methods").splitlines()
    assert {line.split()[0] for line in lines} == METHODS.keys()
    assert all(len(line.split()) > 5 for line in lines)


def test_the_package_brings_its_docs_and_examples(capsys):
    assert "checkpoints" in said(capsys, "docs").splitlines()
    assert said(capsys, "docs", "algorithms/stare") == (ROOT / "docs/algorithms/stare.md").read_text()
    assert said(capsys, "example", "demo_cpu/run.toml") == (ROOT / "examples/demo_cpu/run.toml").read_text()
    assert main(["docs", "checkpoint"]) == 2
    assert "did you mean 'checkpoints'?" in capsys.readouterr().err


def test_version_names_what_it_runs_on(capsys):
    assert {"stare_megatron", "torch", "ray", "python", "hardware"} <= {
        line.split()[0] for line in said(capsys, "version").splitlines()
    }


def test_a_dry_run_of_a_study_lists_runs_and_settings(files, capsys):
    lines = said(
        capsys, "study", str(ROOT / "examples/entropy_band/study.toml"), "--form", "quick", "--dry-run"
    ).splitlines()
    assert any(line.startswith("stare_o1-seed1: run.dir=") and "run.seed=1" in line for line in lines)
    assert not (files / "runs").exists()


@pytest.mark.parametrize("command", ["train", "eval", "plot", "study", "compare", "config", "docs", "example"])
def test_help_gives_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"examples:\n  {called()} {command}" in capsys.readouterr().out


def test_a_tiny_model_is_made_by_the_command(tmp_path, capsys):
    out = tmp_path / "made"
    sizes = ("--train-prompts", "8", "--eval-prompts", "4", "--random")
    assert f"{out}: order_free_sum, 2 layers, " in said(capsys, "make-tiny-model", "--out", str(out), *sizes)
    assert (out / "model/config.json").is_file()
    assert main(["make-tiny-model", "--out", str(out), "--task", "nowhere"]) == 2
    assert "unknown task 'nowhere' (there are " in capsys.readouterr().err
