"""Objects of the user's, at the door: where they are looked for, what is refused, what their settings become."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from stare_megatron import config
from stare_megatron.checkpoint import settings as kept
from stare_megatron.config.registry import load_object
from stare_megatron.config.reward import WorkerConfig
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml

TREE = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "reward": {"name": "exact"}}
REWARD = """
from pydantic import Field
from stare_megatron.config import Free, Section
from stare_megatron.rewards import text_reward

class Settings(Section):
    weight: float = Field(default=0.5, gt=0, description="A factor.")
    threads: Free[int] = Field(default=1, description="Changes nothing that is trained.")
    must: str = Field(description="Has no default.")

def score(prompt, text, settings):
    return settings.weight

def plain(prompt, text):
    return 1.0

def four(prompt, text, a, b):
    return 1.0

async def two(prompt, text):
    return 1.0

class Grader:
    pass

OWN = text_reward(score, Settings, columns=("tests",))
"""
ENV = """
from stare_megatron.config import Section
from stare_megatron.envs import EnvKind
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.types import Status

class Settings(Section):
    notebook: bool = True

def make(prompt, context):
    return SingleTurn(prompt)

BOX = EnvKind(make=make, settings=Settings, needs_sandbox=True, session_key="notebook")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "environment.py").write_text(ENV)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(**tables):
    return config.parse(TREE | tables, "x.toml")


def refused(**tables):
    with pytest.raises(UserError) as e:
        parse(**tables)
    assert str(e.value).startswith("x.toml: ")
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nowhere.py:OWN", ["there is no file {here}/nowhere.py", "current directory"]),
        ("reward.py", ["did you mean 'reward.py:OBJECT'?", "path/to/file.py:object"]),
        ("reward.py:OWM", ["reward.py has no 'OWM'; did you mean 'OWN'?"]),
        ("reward.py:x y", ["not of the form"]),
        ("reward.py:Grader", ["is the class Grader; want RewardKind(make=Grader)"]),
        ("reward.py:REWARD", ["has no 'REWARD'"]),
        ("reward.py:four", ["is `def four(prompt, text, a, b)`; want `def grade(prompt, text) -> float`"]),
        (
            "reward.py:two",
            ["is `async def two(prompt, text)`; want", "`async def reward(prompt, trajectory, tokenizer)"],
        ),
        ("environment.py:BOX", ["is a EnvKind; want a RewardKind or"]),
        ("no_such_package.rewards:OWN", ["no module named 'no_such_package'", "PYTHONPATH"]),
        ("json:dump_", ["json has no 'dump_'; did you mean 'dump'?"]),
        ("exakt", ["'exakt' is not registered (did you mean 'exact'?)"]),
        ("gsm8k", ["'gsm8k' is not registered (did you mean 'math'?); use one of code, exact, format"]),
    ],
)
def test_a_wrong_object_is_refused(own, name, parts):
    message = refused(reward={"name": name})
    assert message.startswith("x.toml: reward.name = ")
    for part in parts:
        assert part.format(here=own) in message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ny = nothing\n", "own.py:2: NameError: name 'nothing' is not defined"),
        ("def f(:\n", "own.py:1: SyntaxError"),
        ("import no_such_thing\n", "own.py:1: ModuleNotFoundError: No module named 'no_such_thing'; install it in"),
        (ENV.replace("make=make", "make=4"), "is not a callable object"),
        (ENV.replace("def make(prompt, context)", "def make(prompt)"), "cannot be called as make(prompt, context)"),
        (ENV.replace('"notebook")', '"book")'), "session_key = 'book' is none of the settings"),
        (ENV.replace("BOX = EnvKind(", "BOX = EnvKind(statuses={Status.VOID}, "), "statuses has Status.VOID"),
        (ENV.replace("settings=Settings", "settings=dict"), "is no subclass of stare_megatron.config.Section"),
    ],
)
def test_what_fails_on_import_is_said_with_its_line(own, code, message):
    (own / "own.py").write_text(code)
    said = refused(env={"name": "own.py:BOX"})
    assert f"env.name = '{own}/own.py:BOX': cannot be imported" in said
    assert message in said
    (own / "own.py").write_text(ENV)  # mended: nothing of the failed import is left
    assert parse(env={"name": "own.py:BOX"}).uses_sandbox


def test_settings_are_checked_and_written_out(own):
    made = parse(reward={"name": "reward.py:OWN", "must": "be"})
    assert made.model_dump()["reward"] == {
        "name": f"{own}/reward.py:OWN",
        "weight": 0.5,
        "threads": 1,
        "must": "be",
    }
    assert made.data.extra_keys == ["tests"]
    (own / "again.toml").write_text(to_toml(made))
    assert config.load(own / "again.toml", []) == made
    changed = config.load(own / "again.toml", ["reward.weight=2", "env.void_turns=mask"])
    assert changed.reward.settings.model_dump()["weight"] == 2
    table = {"name": "reward.py:OWN", "must": "be"}
    assert "unknown key 'reward.wieght'; did you mean 'reward.weight'?" in refused(reward=table | {"wieght": 1})
    assert "reward.weight = 0: must be above 0.0" in refused(reward=table | {"weight": 0})
    assert "key 'reward.must' is missing: Has no default." in refused(reward={"name": "reward.py:OWN"})
    assert "unknown key 'reward.weight'" in refused(reward={"name": "reward.py:plain", "weight": 1})
    assert 'timeout is not used by name = "exact"; set name = "math"' in refused(
        reward={"name": "exact", "timeout": 1.0}
    )
    parse(reward={"name": "exact", "timeout": 10.0})  # the default, as folders of earlier runs hold it
    taken = "class Settings(Section):\n    name: str = ''"
    (own / "taken.py").write_text(ENV.replace("class Settings(Section):", taken))
    assert "has a setting 'name', which the table has itself" in refused(env={"name": "taken.py:BOX"})


def test_tables_are_made_in_python_too(own):
    made = config.RewardConfig(name="math", settings=WorkerConfig(timeout=3.0))
    assert made == parse(reward={"name": "math", "timeout": 3.0}).reward
    assert "unknown key 'reward.settings'" in refused(reward={"name": "math", "settings": {"timeout": 3.0}})


def test_the_sandbox_follows_from_the_environment(own):
    made = parse(env={"name": "environment.py:BOX"})
    assert made.uses_sandbox
    message = refused(env={"name": "environment.py:BOX"}, sandbox={"url": "http://box"})
    assert "env.notebook = true: the server at sandbox.url = 'http://box' keeps no state" in message
    parse(env={"name": "environment.py:BOX", "notebook": False}, sandbox={"url": "http://box"})


def test_another_process_reads_what_was_pickled(own, tmp_path_factory):
    """As Ray's actors do: elsewhere, with nothing loaded."""
    made = parse(reward={"name": "reward.py:OWN", "must": "be"}, env={"name": "environment.py:BOX"})
    file = own / "config.pickle"
    file.write_bytes(pickle.dumps(made))
    code = (
        "import pickle, sys; made = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert pickle.loads(pickle.dumps(made)) == made\n"
        "print(made.reward.settings, made.uses_sandbox)"
    )
    command = [sys.executable, "-c", code, str(file)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "weight=0.5 threads=1 must='be' True", done.stderr


def test_a_file_imports_its_neighbours(own):
    (own / "helper_of_own_reward.py").write_text("VALUE = 3\n")
    (own / "own.py").write_text("from helper_of_own_reward import VALUE\n")
    assert load_object(f"{own}/own.py:VALUE", "key") == 3


def test_a_resumed_run_has_the_same_object(own, tmp_path):
    model = tmp_path / "m"
    model.mkdir()

    def settings(**reward):
        table = {"name": f"{own}/reward.py:OWN"} | ({} if "name" in reward else {"must": "be"}) | reward
        return kept.settings_of(parse(reward=table, model={"path": str(model)}))

    then = settings()
    kept.write(tmp_path, then)
    kept.check_settings(tmp_path, settings(threads=8), [])
    with pytest.raises(UserError, match=r"reward\.weight was 0\.5, is 0\.7"):
        kept.check_settings(tmp_path, settings(weight=0.7), [])
    kept.check_settings(tmp_path, settings(weight=0.7), ["reward.weight"])
    (difference,) = kept.differences(then.config, settings(name="exact").config)
    assert difference.key == "reward.name"
    (own / "reward.py").write_text(REWARD + "# changed\n")
    with pytest.raises(UserError, match=r"the file of reward\.name = .* has changed since"):
        kept.check_settings(tmp_path, settings(), [])
    kept.check_settings(tmp_path, settings(), ["reward.name"])
