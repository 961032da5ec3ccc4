"""Groups whose samples are spread over two real engines are those of one engine."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl, trace
from tests import programs
from tests.e2e import test_train as demo

pytestmark = pytest.mark.runs
STEPS, PROMPTS = 3, 16

material = demo.material


def trained(material: Path, runs: Path, engines: int, spread_below: int) -> Path:
    """The folder of a run."""
    settings: dict[str, object] = demo.EVERY_SAMPLE | {
        "run.steps": STEPS,
        "rollout.prompts_per_step": PROMPTS,
        "inference.engines": engines,
        "inference.spread_below": spread_below,
    }
    done = programs.run(demo.arguments(material, runs, **settings), cwd=demo.ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "e2e"


def served(run: Path) -> list[dict[str, int]]:
    """Of each step and prompt: how many engines sampled a part of its group."""
    found = []
    for step in trace.read(run):
        if not step.trained:
            continue
        engines: dict[str, set[str]] = collections.defaultdict(set)
        for track, activities in step.tracks.items():
            if track.startswith("engine"):
                for activity in activities:
                    if activity.name == "sample":
                        engines[activity.detail].add(track)
        found.append({prompt: len(engines[prompt]) for prompt in step.trained})
    return found


def test_spread_groups_are_those_of_one_engine(material: Path, tmp_path: Path) -> None:
    """Most groups are sampled by both; seeds, tokens, rewards and what is learned are bit for bit the
    same, since an engine's samples do not depend on what else is in its batch."""
    one, two = trained(material, tmp_path / "one", 1, 0), trained(material, tmp_path / "two", 2, 64)
    spread = [engines for of_step in served(two) for engines in of_step.values()]
    assert len(spread) == STEPS * PROMPTS
    # Measured: 39 of 48. Both parts of a prompt that takes a dropped one's place go where there is less to do.
    assert spread.count(2) > len(spread) / 2
    assert all(set(of_step.values()) == {1} for of_step in served(one))
    rows = [jsonl.read(run / "metrics.jsonl") for run in (one, two)]
    assert all(row["sync/probe"] < 1e-3 and row["mismatch/mean"] < 1e-3 for found in rows for row in found)
    for step in range(1, STEPS + 1):
        mine, theirs = (demo.prompts_of(run / f"samples/step_{step:06d}.jsonl") for run in (two, one))
        assert len(mine) == PROMPTS * 8
        for a, b in zip(mine, theirs, strict=True):
            assert (a["prompt_id"], a["sample"], a["seed"], a["reward"]) == (
                b["prompt_id"],
                b["sample"],
                b["seed"],
                b["reward"],
            )
            assert a["spans"] == b["spans"]
    mine, theirs = ([demo.learned(row) for row in found] for found in rows)
    assert mine == theirs
