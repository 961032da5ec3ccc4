"""The example of one's own reward and environment, run as it is written: Ray, a vLLM engine, a Megatron rank."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs
from tests.contracts.source import ROOT

EXAMPLE = ROOT / "examples/your_own"
STEPS = 2


def test_prompts_are_those_that_the_tool_writes() -> None:
    rows = runpy.run_path(str(EXAMPLE / "make_prompts.py"))["rows"]()
    assert [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text().splitlines()] == rows


@pytest.mark.runs
def test_the_example_trains(tmp_path: Path) -> None:
    """Rewards and observations come from the user's files, under the settings of the command line."""
    make(default_settings("order_free_sum", layers=2, seed=0), tmp_path / "made", 512, 16)
    keys: dict[str, object] = {
        "model.path": tmp_path / "made/model",
        "run.dir": tmp_path,
        "run.steps": STEPS,
        "reward.partial": 0.3125,
        "logging.samples": 4096,
        "checkpoint.export_final": "false",
    }
    command = [sys.executable, "-m", "stare_megatron", "train", "examples/your_own/run.toml", "--quiet"]
    command += [f"{key}={value}" for key, value in keys.items()]
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "your_own"

    rows = jsonl.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert 1 < row["tools/turns"] <= 2
        assert row["tools/observation_tokens"] > 0
        assert row["mismatch/mean"] < 1e-3

    written = tomllib.loads((run / "config.toml").read_text())
    assert written["env"] == {
        "name": f"{EXAMPLE / 'environment.py'}:ENV",
        "attempts": 2,
        "again": "-",
        "void_turns": "train",
    }
    assert written["data"]["extra_keys"] == ["tolerance"]
    assert json.loads((run / "run.json").read_text())["starts"][0]["code"].keys() == {"reward.name", "env.name"}

    rewards: set[float] = set()
    for line in (run / "samples/step_000001.jsonl").read_text().splitlines():
        sample = json.loads(line)
        rewards.add(sample["reward"])
        observed = ["".join(span["pieces"]).strip() for span in sample["spans"] if span["kind"] == "observation"]
        assert all(text.startswith("- ") for text in observed), observed
    assert rewards == {0.0, 0.3125, 1.0}
