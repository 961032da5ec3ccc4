"""Every shell command of the README and the docs is one that the programs accept; some are run as written."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from stare_megatron import __main__, config
from stare_megatron.launch import job
from stare_megatron.metrics.trace import StepTrace, TraceFile
from stare_megatron.study import spec
from stare_megatron.types.report import Activity
from tests.shellcheck import complaints
from tests.unit.convert import hf_folders
from tests.unit.docs.commands import PROGRAMS, ROOT, Command, commands, pages

COMMANDS = commands()
# What stands for a file or name of the reader's own.
PLACEHOLDERS = {
    "DATASET": "gsm8k",
    "run.toml": "examples/demo_cpu/run.toml",
    "mine/run.toml": "examples/your_own/run.toml",
    "sft.toml": "examples/tool_use_7b/sft.toml",
}
# Folders of this repository: a path that begins so must exist.
OURS = ("examples/", "docs/", "tools/", "tests/", "stare_megatron/", "patches/")
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


class Parsed(Exception):
    """Raised in place of what a program does after it has read its arguments."""


def of(program: str, *tools: str) -> list[Command]:
    return [c for c in COMMANDS if c.words[0] == program and (not tools or c.words[1].startswith(tools))]


def filled(words: Sequence[str]) -> list[str]:
    return [PLACEHOLDERS.get(word.removesuffix("..."), word.removesuffix("...")) for word in words]


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the arguments of `stare-megatron` as it does."""
    return __main__._parser().parse_known_args(list(words))


def test_commands_were_found():
    assert {c.words[0] for c in COMMANDS} == set(PROGRAMS)
    assert {"train", "eval", "plot", "inspect", "convert", "compare", "study", "scale"} <= {
        c.words[1] for c in of("stare-megatron")
    }


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_paths_of_the_repository_exist(command):
    for word in command.words:
        if word.startswith(OURS):
            assert list(ROOT.glob(word.partition("::")[0].rstrip("/"))), word


@pytest.mark.parametrize("page", sorted(ROOT.glob("examples/*/README.md")), ids=lambda p: p.parent.name)
def test_an_example_says_which_environment_has_its_commands(page):
    text = page.read_text()
    assert "source .venv" in text or "../base/README.md" in text


@pytest.mark.parametrize("command", of("stare-megatron"), ids=str)
def test_the_program_takes_it(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, rest = parse(filled(command.words[1:]))
    if command.words[1] in ("train", "eval"):
        config.load(args.config, [*args.overrides, *rest])
        return
    if command.words[1] == "sft":
        config.load_sft(args.config, [*args.overrides, *rest])
        return
    if command.words[1] == "launch":
        job.of(args, rest)
        return
    assert rest == []
    if command.words[1] == "study" and args.study.exists():
        assert spec.load(args.study, args.form, args.only).jobs


@pytest.mark.parametrize("command", of("python", "tools/"), ids=str)
def test_the_tool_takes_it(command, monkeypatch):
    script, arguments = ROOT / command.words[1], filled(command.words[2:])
    if not re.search(r"\bmain\b", script.read_text()):
        assert arguments == []
        return
    original = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        found, rest = original(self, args, namespace)
        if not rest:
            raise Parsed
        return found, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_named_exist(page):
    keys = config.all_keys(root=config.SftConfig) | config.all_keys()
    tables = {key.split(".")[0] for key in keys}
    groups = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
    named = re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:\s*=[^`]*)?`", page.read_text())
    # Settings of an object that the page, or a file beside it, shows how to write.
    shown = "".join(p.read_text() for p in [page, *page.parent.glob("*.py")])
    own = {name for name in named if re.search(rf"^    {name.rpartition('.')[2]}: ", shown, re.MULTILINE)}
    unknown = {
        name
        for name in named
        if name.split(".")[0] in tables
        and not name.endswith((".jsonl", ".toml", ".json", ".py", ".safetensors"))
        and not name.startswith(("trainer.megatron.", "inference.vllm.", "data.chat_template_kwargs."))
        and name not in keys | dict.fromkeys(groups) | dict.fromkeys(own)
    }
    assert unknown == set()


@pytest.mark.parametrize("command", of("torchrun"), ids=str)
def test_torchrun_gets_a_script_of_ours(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    at = next(i for i, word in enumerate(command.words) if word.endswith(".py"))
    path, *overrides = filled(command.words[at + 1 :])
    config.load(Path(path), overrides)


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_the_target_exists(command):
    targets = [word for word in command.words[1:] if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), target


@pytest.mark.parametrize("command", of("pip"), ids=str)
def test_pip_installs_what_the_package_asks_for(command):
    assert command.words[1] == "install"
    extras = tomllib.loads(PYPROJECT)["project"]["optional-dependencies"]
    for word in command.words[2:]:
        if word.startswith("-"):
            continue
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= extras.keys()
        else:
            assert word in PYPROJECT or word in MAKEFILE, (
                f"{word}: another version than pyproject.toml and Makefile have"
            )


@pytest.mark.parametrize("command", [*of("pytest"), *of("python", "-m")], ids=str)
def test_pytest_would_find_a_test(command):
    words = command.words[1:] if command.words[0] == "pytest" else command.words[3:]
    options = argparse.ArgumentParser()
    options.add_argument("paths", nargs="*")
    options.add_argument("-k", default="")
    options.add_argument("-m", default="")
    asked = options.parse_args(words)
    files = [
        f for p in asked.paths or ["tests"] for f in ([ROOT / p] if p.endswith(".py") else (ROOT / p).rglob("*.py"))
    ]
    text = "\n".join(f.read_text() for f in files)
    assert re.search(rf"def test_\w*{asked.k}", text)
    assert f"mark.{asked.m}" in text


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as the docs suppose it: a clone's examples, a run file, a run, a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples/demo_cpu/run.toml", "run.toml")
    recorded = ROOT / "examples/entropy_band/results/stare_o1-seed1"
    for name in ("NAME", "A", "B"):
        shutil.copytree(recorded, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("metrics*"))
        with gzip.open(recorded / "metrics.jsonl.gz", "rb") as packed:
            (tmp_path / "runs" / name / "metrics.jsonl").write_bytes(packed.read())
    hf_folders.make(tmp_path / "FOLDER")
    return tmp_path


def as_written(text: str) -> list[str]:
    """The arguments of the command with these words, which some page has, wild cards resolved as by a shell."""
    [words] = {c.words for c in COMMANDS if " ".join(c.words).startswith(text)}
    here = Path()
    return [w for word in words[1:] for w in (sorted(map(str, here.glob(word))) if "*" in word else [word])]


def test_print_config_as_written(reader, capsys):
    assert __main__.main(as_written("stare-megatron train run.toml --print-config")) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert config.parse(printed, "printed") == config.load(Path("run.toml"), [])
    # "Every key in use": what the run's method, controller and schedule do not use is left out.
    assert printed["algorithm"]["stare"]["target_entropy"] == 0.2
    assert "dapo" not in printed["algorithm"]
    assert "kp" not in printed["algorithm"]["stare"]


def test_compare_as_written(reader):
    # The pictures are tested elsewhere, and take as long as all the rest here.
    assert __main__.main([*as_written("stare-megatron compare runs/A runs/B"), "--no-png"]) == 0
    assert (reader / "runs/A-report/report.html").stat().st_size > 1e6


def test_plot_as_written(reader):
    assert __main__.main(as_written("stare-megatron plot runs/NAME")) == 0
    assert (reader / "runs/NAME/curves.png").exists()


def test_inspect_as_written(reader, capsys):
    assert __main__.main(as_written("stare-megatron inspect FOLDER --write-manifest")) == 0
    assert __main__.main(as_written("stare-megatron inspect FOLDER --verify")) == 0
    assert __main__.main(as_written("stare-megatron inspect FOLDER --tensors")) == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out


def test_plan_as_written(reader, capsys):
    shape = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 512}
    shape |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 192, "vocab_size": 112, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    folder = reader / ".cache/demo/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape))
    assert __main__.main(as_written("stare-megatron plan run.toml --search")) == 0
    assert "\nthe first: trainer.micro_batch_tokens=" in capsys.readouterr().out
    assert __main__.main(as_written("stare-megatron plan run.toml --json")) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 2


def test_launch_as_written(reader, capsys):
    assert __main__.main(as_written("stare-megatron launch slurm run.toml --dry-run")) == 0
    (reader / "job.sbatch").write_text(capsys.readouterr().out)
    assert complaints(reader / "job.sbatch") == ""
    assert not (reader / "runs/launch").exists()


def test_trace_as_written(reader, capsys):
    tracks = {"driver": [Activity("step 1", 1.8e9, 9.0), Activity("rollout", 1.8e9, 4.0)]}
    TraceFile(reader / "runs/NAME").append(StepTrace(1, tracks, []))
    assert __main__.main(as_written("stare-megatron trace runs/NAME")) == 0
    assert "trace.json: 1 step(s)" in capsys.readouterr().out
    names = {event["name"] for event in json.loads((reader / "runs/NAME/trace.json").read_text())["traceEvents"]}
    assert {"step 1", "rollout"} <= names


def test_watch_as_written(reader):
    assert __main__.main(as_written("stare-megatron watch runs/NAME --once x.html")) == 0
    assert "policy/entropy" in (reader / "x.html").read_text()


def test_a_study_of_sizes_as_written(reader, capsys):
    words = as_written("stare-megatron scale examples/scaling_qwen2_5/study.toml --dry-run")
    assert __main__.main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len([line for line in listed if "model.path=models/Qwen2.5-" in line]) == 18


def test_scale_as_written(reader, capsys):
    shutil.copytree(ROOT / "examples/scaling_cpu/results", reader / "runs/scaling_cpu")
    words = as_written("stare-megatron scale runs/scaling_cpu --out report --json numbers.json")
    assert __main__.main(words) == 0
    assert json.loads((reader / "numbers.json").read_text())
    assert list((reader / "report").glob("*.html"))


def test_config_as_written(capsys):
    assert __main__.main(as_written("stare-megatron config trainer.scoring")) == 0
    assert capsys.readouterr().out.startswith("trainer.scoring")


def test_tool_prints_the_picture_as_written(tmp_path):
    tool = runpy.run_path(str(ROOT / "tools/plot_entropy_band.py"))
    assert tool["main"](["--out", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").stat().st_size > 1e4
