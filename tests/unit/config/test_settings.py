"""Kinds of settings that would do nothing, or something else than they say."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, ValidationError

from stare_megatron.__main__ import main
from stare_megatron.config import Section, load, parse
from stare_megatron.config.judge import JudgeConfig
from stare_megatron.config.loader import walk
from stare_megatron.config.reward import CodeConfig, FormatConfig, LengthConfig
from stare_megatron.errors import UserError
from stare_megatron.host import paths
from stare_megatron.run import preflight
from tests.configs import configuration, tables
from tests.unit.config.test_config_properties import with_value


def refusal(key: str, value: Any, **beside: Any) -> str:
    tree = with_value(tables(), key, value)
    for other, chosen in beside.items():
        tree = with_value(tree, other.replace("__", "."), chosen)
    with pytest.raises(UserError) as e:
        parse(tree, "x.toml")
    return str(e.value)


class TestPaths:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("DATA", "/data")
        monkeypatch.delenv("NOWHERE", raising=False)

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("~/a", "/home/me/a"),
            ("$HOME/a", "/home/me/a"),
            ("${DATA}/a b", "/data/a b"),
            ("a/../b", "{here}/b"),
            ("./~a", "{here}/~a"),
            ("/a//b/", "/a/b"),
        ],
    )
    def test_written_and_meant(self, tmp_path: Path, written: str, meant: str) -> None:
        meant = meant.format(here=tmp_path)
        tree = {
            "run": {"dir": written, "resume": written},
            "model": {"path": written, "weights": written},
            "data": {"train": [written]},
            "eval": {"benchmarks": [written]},
        }
        c = configuration(**tree)
        found = [c.run.dir, c.run.resume, c.model.path, c.model.weights, *c.data.train, c.eval.benchmarks[0].path]
        assert list(map(str, found)) == [meant] * 6
        assert [p.default for p in walk() if p.name == "run.dir"] == [Path("runs")]

    def test_in_a_file_an_override_and_on_the_command_line_alike(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(
            'run.steps = 1\nmodel.path = "m"\ndata.train = ["$DATA/a.jsonl"]\nreward.name = "exact"\n'
        )
        c = load(Path("x.toml"), ["model.path=~/m", "run.dir='${DATA}/runs'"])
        assert [str(c.model.path), str(c.run.dir), str(c.data.train[0])] == [
            "/home/me/m",
            "/data/runs",
            "/data/a.jsonl",
        ]
        assert paths.argument("~/m") == c.model.path
        assert configuration().run.dir == tmp_path / "runs"

    @pytest.mark.parametrize(
        "written", ["$NOWHERE/a", "${NOWHERE}/a", "~nobody_of_this_name/a", "", " ", "a ", "a\0b", "x" * 300]
    )
    def test_what_cannot_be_a_path_is_refused(self, capsys: pytest.CaptureFixture[str], written: str) -> None:
        for key in ("run.dir", "model.path", "run.resume", "data.train"):
            assert refusal(key, written).startswith(f"x.toml: {key} = ")
        with pytest.raises(SystemExit):
            main(["plot", written])
        assert "argument run: " in capsys.readouterr().err

    def test_an_objects_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATA", str(tmp_path))
        (tmp_path / "own.py").write_text("def reward(prompt, text):\n    return 1.0\n")
        assert configuration(reward={"name": "$DATA/own.py:reward"}).reward.name == f"{tmp_path}/own.py:reward"
        assert "$NOWHERE is not defined" in refusal("reward.name", "$NOWHERE/own.py:reward")

    def test_those_that_may_be_left_out(self, tmp_path: Path) -> None:
        """In a user's own table."""

        class Own(Section):
            file: Path | None = None
            noted: Annotated[Path, Field(description="x")] | None = None
            files: list[Path] | None = None
            size: int | None = None

        own = Own.model_validate({"file": "~/a", "noted": "b", "files": ["$DATA/c", "d"]})
        assert (own.file, own.noted) == (Path("/home/me/a"), tmp_path / "b")
        assert own.files == [Path("/data/c"), tmp_path / "d"]
        assert Own(file=None) == Own()
        for wrong in ({"file": "$NOWHERE/a"}, {"files": ["a", "./a"]}, {"size": 2**31}):
            with pytest.raises(ValidationError):
                Own.model_validate(wrong)

    def test_the_same_in_a_process_elsewhere(self, tmp_path: Path) -> None:
        """An actor of a cluster starts in another folder than the driver."""
        import pickle

        made = pickle.dumps(configuration(run={"dir": "runs"}))
        code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).folder)"
        done = subprocess.run([sys.executable, "-c", code], input=made, capture_output=True, cwd="/", timeout=600)
        assert done.stdout.decode().strip() == f"{tmp_path}/runs/unit"


NUMBERS = [k for k in walk() if k.field.annotation in (int, float)]
LISTS = [
    k
    for k in walk()
    if typing.get_origin(k.field.annotation) is list and typing.get_args(k.field.annotation)[0] in (str, Path)
]
TEXTS = [k for k in walk() if k.field.annotation is str]


@pytest.mark.parametrize("key", NUMBERS, ids=lambda k: k.name)
def test_numbers_are_bounded_on_both_sides(key: Any) -> None:
    wrong: list[Any] = [float("nan"), float("inf"), float("-inf"), 10**30, 10**400, True, "many"]
    bounds = key.field.metadata
    if not any(isinstance(b, Ge | Gt) for b in bounds):  # a covariance, an entropy coefficient, a judge's scale
        free = ("algorithm.clip_cov.low", "algorithm.clip_cov.high", "algorithm.entropy_bonus.coefficient")
        assert key.name in (*free, "reward.lowest", "reward.highest")
    else:
        bottom: Any = next(b.ge if isinstance(b, Ge) else b.gt for b in bounds if isinstance(b, Ge | Gt))
        wrong.append(min(0, bottom) * 2 - 1)
    if key.field.annotation is float:
        wrong += [1e308, 1e-310]
    if any(isinstance(b, Le | Lt) for b in bounds):
        top = next(b.le if isinstance(b, Le) else b.lt for b in bounds if isinstance(b, Le | Lt))
        wrong.append(top * 2 + 1)
    leaf = key.name.rpartition(".")[2]
    for value in wrong:
        if rows_of(key.name):
            assert leaf in refused_in_a_row(key.name, value)
        else:
            assert leaf in refusal(key.name, value, **beside(key.name))
            if value is not True and value != 10**400:  # "True" is a word
                assert leaf in refusal(key.name, str(value), **beside(key.name))


REWARDS: dict[str, tuple[type[Section], dict[str, Any]]] = {
    "judge": (JudgeConfig, {"url": "http://here/v1", "model": "m"}),
    "code": (CodeConfig, {}),
    "format": (FormatConfig, {"boxed": True}),
    "length": (LengthConfig, {"limit": 9, "buffer": 1}),
}


def beside(key: str) -> dict[str, Any]:
    """What makes a table take a key of it."""
    if key.startswith("env.") and key != "env.name":
        return {"env__name": "tool_use"}
    table, _, leaf = key.partition(".")
    kind = next((name for name, (section, _) in REWARDS.items() if leaf in section.model_fields), "")
    if table != "reward" or not kind:
        return {}
    needs = {f"reward__{other}": value for other, value in REWARDS[kind][1].items() if other != leaf}
    return {"reward__name": kind} | needs


def rows_of(key: str) -> str:
    """The table whose rows have the key, "" for a key of a single table."""
    return next((table for table in ("eval.benchmarks", "reward.parts") if key.startswith(f"{table}.")), "")


def refused_in_a_row(key: str, value: Any) -> str:
    table, leaf = rows_of(key), key.rpartition(".")[2]
    if table == "eval.benchmarks":
        return refusal(table, [{"path": "a", leaf: value}])
    return refusal(table, [{"name": "exact", leaf: value}], reward__name="sum")


@pytest.mark.parametrize("key", [k for k in LISTS if k.name != "run.resume_allow"], ids=lambda k: k.name)
def test_lists_have_no_empty_entry_and_none_twice(key: Any) -> None:
    assert "has an empty entry" in refusal(key.name, ["a", ""], **beside(key.name)) or key.name == "data.train"
    assert "'a' twice" in refusal(key.name, ["a", "b", "a"], **beside(key.name)).replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize("key", [k for k in TEXTS if k.name != "eval.benchmarks.name"], ids=lambda k: k.name)
def test_an_empty_text_means_something_or_is_refused(key: Any) -> None:
    if key.name == "reward.parts.label":
        part = {"name": "exact", "label": ""}
        assert parse(with_value(tables(), "reward", {"name": "sum", "parts": [part]}), "x.toml")
    elif key.name == "reward.parts.name":
        assert "name" in refused_in_a_row(key.name, "")
    elif key.default == "":
        tree = with_value(tables(), key.name, "")
        for other, chosen in ({"env__name": "tool_use"} | beside(key.name)).items():
            tree = with_value(tree, other.replace("__", "."), chosen)
        assert parse(tree, "x.toml")
    else:
        assert key.name in refusal(key.name, "", **beside(key.name))


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("algorithm.method", "GRPO", "grpo"),
        ("algorithm.method", "Dr-GRPO", "dr_grpo"),
        ("algorithm.method", " stare ", "stare"),
        ("algorithm.method", "ppo", "grpo"),
        ("reward.name", "MATH", "math"),
        ("reward.name", "gsm8k", "math"),
        ("reward.name", "math_verify", "math"),
        ("reward.name", "Math-Verify", "math"),
        ("reward.name", "exact match", "exact"),
        ("reward.name", "reasoning-gym", "reasoning_gym"),
        ("env.name", "Tool_Use", "tool_use"),
        ("env.name", "multi_turn", "tool_use"),
        ("env.name", "single-turn", "single_turn"),
        ("logging.wandb", "Offline", "offline"),
        ("model.dtype", "BFloat16", "bfloat16"),
        ("inference.placement", "Colocated", "colocated"),
        ("trainer.optimizer.schedule", "Cosine", "cosine"),
        ("run.resume", "AUTO", "auto"),
    ],
)
def test_a_name_written_otherwise_is_told(key: str, written: str, meant: str) -> None:
    assert f"did you mean '{meant}'?" in refusal(key, written)


def test_a_parser_in_capitals_is_told() -> None:
    assert "did you mean 'hermes'?" in refusal("env.parser", "Hermes", env__name="tool_use")


@pytest.mark.parametrize(
    ("key", "value", "beside", "words"),
    [
        ("rollout.stop", [""], {}, "has an empty entry"),
        ("rollout.temperature", 0.009, {}, "must be at least 0.01"),
        ("rollout.temperature", 0, {}, "must be at least 0.01"),
        ("eval.temperature", 1e-3, {}, "must be at least 0.01"),
        ("trainer.optimizer.warmup_steps", 101, {}, "run.steps x trainer.updates_per_batch are 5"),
        ("trainer.optimizer.warmup_steps", 200, {"trainer__optimizer__schedule": "cosine"}, "needs at least 202"),
        ("trainer.optimizer.min_lr", 1e-5, {"trainer__optimizer__schedule": "cosine"}, "is not below lr = 1e-06"),
        ("trainer.optimizer.min_lr", 1e-6, {"trainer__optimizer__schedule": "linear"}, "is not below lr = 1e-06"),
        ("trainer.optimizer.min_lr", 1e-7, {}, 'is for schedule = "cosine" or "linear"'),
        ("algorithm.stare.alpha", 0.2, {}, "is for algorithm.stare.adaptive = true"),
        ("algorithm.clip_cov.low", 6.0, {"algorithm__method": "clip_cov"}, "is not below high = 5.0"),
        ("checkpoint.best_mode", "min", {}, "is for best_metric"),
        ("checkpoint.local", "nvme", {}, "give an absolute path"),
        ("checkpoint.local", str(Path("runs/x").absolute()), {"run__name": "x"}, "lie in each other"),
        ("checkpoint.local_keep", 2, {}, "is for checkpoint.local, which is empty"),
        ("checkpoint.durable_every", 2, {}, "is for checkpoint.local, which is empty"),
        *(
            ("cluster.address", address, {}, f"= {address!r}: must be `local`, `auto` or HOST:PORT")
            for address in ("nowhere", "host:", ":6379", "host:port", "host:70000", "host:0", "h:999999")
        ),
        ("cluster.object_store_mb", 900, {"cluster__address": "auto"}, 'is for address = "local"'),
        ("env.tool", "shell", {"env__name": "tool_use", "env__parser": "retool"}, 'is for parser = "hermes"'),
        ("sandbox.preload", ["os; x"], {}, "no name of a module"),
        ("logging.wandb_tags", ["x" * 65], {}, "at most 64 characters"),
        (
            "trainer.offload",
            ["parameters"],
            {"inference__placement": "separate"},
            'set inference.placement = "colocated"',
        ),
        ("trainer.offload_step_mb", 100, {"trainer__offload": ["gradients"]}, "it is ['gradients']"),
        ("run.name", "..", {}, "must match"),
        ("run.name", "a b", {}, "must match"),
        ("run.name", "-x", {}, "must match"),
        ("run.name", "x" * 101, {}, "at most 100"),
        ("eval.benchmarks", [{"path": "a", "name": ".."}], {}, "must match"),
        ("eval.benchmarks", ["a/x.jsonl", "b/x.jsonl"], {}, "are both called 'x'"),
        ("data.train", ["a.jsonl", "./a.jsonl"], {}, "twice"),
        ("data.train", [], {}, "must have at least 1 entry"),
    ],
)
def test_what_would_do_nothing_or_something_else(key: str, value: Any, beside: dict[str, Any], words: str) -> None:
    message = refusal(key, value, **beside)
    assert words in message
    assert key.rpartition(".")[2] in message


def test_a_warm_up_as_long_as_the_run_is_taken_and_a_longer_one_in_a_short_trial_is_told() -> None:
    fits, trial = (configuration(trainer={"optimizer": {"warmup_steps": steps}}) for steps in (5, 6))
    assert preflight.check_method(fits) == ()
    assert "trainer.optimizer.warmup_steps = 6" in preflight.check_method(trial)[0]


def test_environment_of_this_process_is_left_alone() -> None:
    before = dict(os.environ)
    configuration(run={"dir": "~/runs"})
    assert dict(os.environ) == before
