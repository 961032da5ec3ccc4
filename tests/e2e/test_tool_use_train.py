"""Tool use through the whole loop: Ray, a vLLM engine, Megatron ranks, the pool of sandboxes, the generated task."""

from __future__ import annotations

import json

import pytest

from stare_megatron.metrics import jsonl
from tests import programs
from tests.contracts.source import ROOT
from tests.e2e.tool_run import command, make_material

STEPS = 4


@pytest.mark.runs
def test_a_policy_trains_with_the_tool(tmp_path):
    """Calls are made and answered, right answers come of them, engine and trainer agree over observations, and the
    run says at which level code was run."""
    done = programs.run(
        command(make_material(tmp_path / "material"), tmp_path, steps=STEPS),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(tmp_path / "tool/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["mismatch/mean"] < 1e-3
        assert 0.4 < row["tools/calls"] < 2
        assert row["tools/turns"] > 1
        assert row["tools/observation_tokens"] > 4
        assert row["tools/call_errors"] < 0.7
        assert 0.1 < row["reward/mean"] < 1
        assert row["response/failed"] == 0
    start = json.loads((tmp_path / "tool/run.json").read_text())["starts"][0]
    assert start["sandbox"].startswith("level ")
