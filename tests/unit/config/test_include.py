"""Files that a run's file includes: what wins, and what is said of a mistake in one of them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml

BASE = 'run.steps = 9\nrun.seed = 3\nmodel.path = "m"\ndata.train = ["a.jsonl", "b.jsonl"]\nreward.name = "math"\n'


def write(folder: Path, **files: str) -> Path:
    """The files by name; returns `run.toml`."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / "run.toml"


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        config.load(file, list(overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_keys_are_merged_and_the_file_itself_wins(tmp_path):
    file = write(tmp_path, base=BASE, run='include = "base.toml"\n[run]\nsteps = 4\n[data]\ntrain = ["c.jsonl"]\n')
    made = config.load(file, ["run.seed=5"])
    assert (made.run.steps, made.run.seed, made.reward.name) == (4, 5, "math")
    assert [path.name for path in made.data.train] == ["c.jsonl"]


def test_the_later_of_two_wins_and_includes_include(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", base=BASE, middle='include = "base.toml"\nrun.steps = 7\nrun.name = "middle"\n')
    write(tmp_path, other='run.name = "other"\n', run='include = ["deep/middle.toml", "other.toml"]\n')
    made = config.load(tmp_path / "run.toml", [])
    assert (made.run.steps, made.run.name, made.run.seed) == (7, "other", 3)


def test_two_may_include_the_same(tmp_path):
    both = 'include = "base.toml"\n'
    file = write(
        tmp_path, base=BASE, one=both + "run.steps = 1\n", two=both, run='include = ["one.toml", "two.toml"]\n'
    )
    assert config.load(file, []).run.steps == 9  # what the later one includes is later too


def test_what_is_recorded_includes_nothing(tmp_path):
    made = config.load(write(tmp_path, base=BASE, run='include = "base.toml"\nrun.steps = 4\n'), [])
    written = to_toml(made)
    assert "include" not in tomllib.loads(written)
    assert config.parse(tomllib.loads(written), "written") == made


@pytest.mark.parametrize(
    ("base", "own", "file", "said"),
    [
        ("trainer.tensor_paralel = 2\n", "", "base.toml", "unknown key 'trainer.tensor_paralel'; did you mean"),
        ("", "trainer.tensor_paralel = 2\n", "run.toml", "unknown key 'trainer.tensor_paralel'"),
        ("trainer.world_size = 0\n", "", "base.toml", "trainer.world_size = 0: must be at least 1"),
        ("trainer.world_size = 2\n", "trainer.world_size = 0\n", "run.toml", "trainer.world_size = 0"),
        ("[trainr]\nworld_size = 1\n", "", "base.toml", "unknown key 'trainr'"),
        ('[[eval.benchmarks]]\npath = "a"\nsmaples = 1\n', "", "base.toml", "unknown key 'eval.benchmarks.smaples'"),
        ("rollout.max_refills = 'x'\n", "rollout.group_size = 4\n", "base.toml", "rollout.max_refills = 'x'"),
        # What several files make together is the run's own.
        ("trainer.world_size = 3\n", "trainer.tensor_parallel = 2\n", "run.toml", "world_size 3 is not a multiple"),
        ("trainer = 3\n", "trainer.world_size = 2\n", "run.toml", "trainer is a table, in {}/base.toml it is a value"),
        ("trainer.world_size = 2\n", "trainer = 3\n", "run.toml", "trainer is a value, in {}/base.toml it is a table"),
    ],
)
def test_a_mistake_names_the_file_it_is_in(tmp_path, base, own, file, said):
    run = write(tmp_path, base=BASE + base, run='include = "base.toml"\n' + own)
    message = refusal(run)
    assert message.startswith(f"{tmp_path / file}: ")
    assert said.format(tmp_path) in message


def test_a_mistake_of_the_command_line_is_said_to_be_there(tmp_path):
    file = write(tmp_path, base=BASE, run='include = "base.toml"\n')
    assert refusal(file, "trainer.world_size=0").startswith("command line: trainer.world_size = 0: ")


def test_a_key_that_no_file_has_is_missed_in_the_run_s_own(tmp_path):
    file = write(tmp_path, base='reward.name = "math"\n', run='include = "base.toml"\nmodel.path = "m"\n')
    assert refusal(file).startswith(f"{file}: key ")


@pytest.mark.parametrize("value", ["3", "[3]", '""', '[["base.toml"]]'])
def test_a_value_that_names_no_file(tmp_path, value):
    assert "include = " in refusal(write(tmp_path, run=f"include = {value}\n"))


def test_a_file_that_is_not_there(tmp_path):
    said = refusal(write(tmp_path, base='include = "nowhere.toml"\n', run='include = "base.toml"\n'))
    assert said.startswith(f"{tmp_path / 'base.toml'}: include = 'nowhere.toml': there is no file")


def test_a_file_that_is_no_toml(tmp_path):
    said = refusal(write(tmp_path, base="steps =\n", run='include = "base.toml"\n'))
    assert said.startswith(f"{tmp_path / 'base.toml'}: not valid TOML")


def test_files_that_include_each_other(tmp_path):
    file = write(tmp_path, run='include = "a.toml"\n', a='include = "b.toml"\n', b='include = "./a.toml"\n')
    said = refusal(file)
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    assert said.startswith(f"{b}: include = './a.toml': the files include each other ({a} -> {b} -> {a})")
    assert "include each other" in refusal(write(tmp_path, run='include = "run.toml"\n'))


def test_include_stands_at_the_top_alone(tmp_path):
    assert "unknown key 'trainer.include'" in refusal(write(tmp_path, run=BASE + 'trainer.include = "a.toml"\n'))
    assert "unknown key 'include'" in refusal(write(tmp_path, run=BASE), "include=a.toml")
