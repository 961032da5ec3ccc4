"""Engines and ranks of a run that samples ahead are killed while the ranks learn and engines sample."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import pytest

from stare_megatron.metrics import trace
from stare_megatron.metrics.events import FILE
from tests.e2e import test_recovery as recovery
from tests.e2e.test_recovery import STEPS, Done
from tests.e2e.test_train import EVERY_SAMPLE, learned, prompts_of

pytestmark = pytest.mark.runs
PROMPTS = 16
STREAM: dict[str, object] = EVERY_SAMPLE | {
    "sampling.mode": "stream",
    "inference.placement": "separate",
    "algorithm.correction.mode": "truncate",
    "inference.engines": 1,
    "rollout.prompts_per_step": PROMPTS,
    "inference.vllm.max_num_seqs": 8,  # so that engines are at work whenever one is killed, on fast machines too
}
ONE_STEP = STREAM | {"sampling.mode": "one_step"}
KILLED = "engine_0:KILL:score:2"
AGAIN = "it is sampled again by the newest policy"

material = recovery.material


def require_every_step(done: Done) -> None:
    """Once each, of other prompts each, with weights that arrived, and nothing is left running."""
    assert done.code == 0, done.said[-4000:]
    assert [row["step"] for row in done.rows] == list(range(1, STEPS + 1))
    assert all(row["sync/probe"] < 1e-3 for row in done.rows)
    files = [done.folder / f"samples/step_{step:06d}.jsonl" for step in range(1, STEPS + 1)]
    trained = [{sample["prompt_id"] for sample in prompts_of(file)} for file in files]
    assert len(set().union(*trained)) == PROMPTS * STEPS
    assert done.left == []


def test_one_step_samples_the_batch_again_by_the_newest_policy(material: Path, tmp_path: Path) -> None:
    done = recovery.run(material, tmp_path, KILLED, **ONE_STEP)
    require_every_step(done)
    assert done.events("engine 0") == ["HEALTHY", "DEAD", "RESTARTING", "STALE", "HEALTHY"]
    assert done.events("trainer ranks") == []
    assert done.said.count(AGAIN) == 1
    assert [row["sync/staleness"] for row in done.rows] == [0, 1, 1, 0, 1]
    assert [row["step"] for row in done.rows if row["mismatch/mean"] < 1e-3] == [1, 4]
    again = [row["fleet/groups_again"] for row in done.rows]
    assert again[3] >= done.rows[3]["groups/sampled"]
    assert again[0] == again[1] == again[4] == 0


def test_stream_goes_on_with_the_groups_in_flight(material: Path, tmp_path: Path) -> None:
    done = recovery.run(material, tmp_path, KILLED, **STREAM)
    require_every_step(done)
    assert done.events("engine 0") == ["HEALTHY", "DEAD", "RESTARTING", "STALE", "HEALTHY"]
    assert done.events("trainer ranks") == []
    assert "AGAIN" in done.events("sampling")
    assert all(row["sync/staleness"] <= 2 for row in done.rows)  # sampling.max_staleness
    assert sum(row["fleet/groups_again"] for row in done.rows) > 0


def test_stream_goes_on_with_the_other_engine(material: Path, tmp_path: Path) -> None:
    """One of two is killed while both sample: what it was at is sampled again by the other, which goes on before the
    dead one is back."""
    done = recovery.run(material, tmp_path, "engine_1:KILL:score:2", **STREAM | {"inference.engines": 2})
    require_every_step(done)
    assert all(row["sync/staleness"] <= 2 for row in done.rows)
    assert done.events("engine 0").count("DEAD") == 0
    assert done.events("engine 1")[:2] == ["HEALTHY", "DEAD"]
    assert done.events("trainer ranks") == []
    assert sum(row["fleet/groups_again"] for row in done.rows) > 0

    events = [json.loads(line) for line in (done.folder / FILE).read_text().splitlines()]
    times = {
        row["new"]: datetime.datetime.fromisoformat(row["time"]).timestamp()
        for row in reversed(events)  # the first of a kind counts
        if row["who"] == "engine 1"
    }
    lost, back = times["DEAD"], times.get("STALE", math.inf)
    steps = {s.step: s for s in trace.read(done.folder)}
    (killed,) = (a.start for a in steps[3].tracks["driver"] if a.name == "score")
    ends = [a.end for s in steps.values() for a in s.tracks["engine 0"] if a.name == "sample"]
    assert killed < lost
    assert any(lost < end < back for end in ends)


RANK_KILLED = "trainer_1:KILL:update:3"


def test_stream_goes_on_with_new_ranks(material: Path, tmp_path: Path) -> None:
    done = recovery.run(material, tmp_path, RANK_KILLED, **STREAM | recovery.SAVED)
    require_every_step(done)
    require_new_ranks(done)
    assert all(row["sync/staleness"] <= 2 for row in done.rows)


def test_one_step_goes_on_with_new_ranks_as_if_nothing_had_happened(material: Path, tmp_path: Path) -> None:
    """Bit for bit: the batch in hand comes from the checkpoint, the one after it is sampled again by the policy before,
    which the engine gets back. What the lost ranks had begun ahead is of no batch."""
    done = recovery.run(material, tmp_path / "killed", RANK_KILLED, **ONE_STEP | recovery.SAVED)
    require_every_step(done)
    require_new_ranks(done)
    clean = recovery.run(material, tmp_path / "clean", recovery.CLEAN, **ONE_STEP)
    require_every_step(clean)
    assert clean.events("trainer ranks") == []
    for run in (done, clean):
        assert [row["sync/staleness"] for row in run.rows] == [0, 1, 1, 1, 1]
    assert [learned(row) for row in done.rows] == [learned(row) for row in clean.rows]
    for step in range(1, STEPS + 1):
        mine, theirs = ((run.folder / f"samples/step_{step:06d}.txt").read_text() for run in (done, clean))
        assert mine.count("===") >= PROMPTS * 8
        assert mine == theirs


def require_new_ranks(done: Done) -> None:
    """They were lost in step 4 and went on from the checkpoint of step 2; the engine stayed."""
    assert done.events("trainer ranks") == ["DEAD", "RESTARTING", "HEALTHY"]
    assert "trainer ranks: RESTARTING -> HEALTHY: going on from step 2" in done.said
    assert done.events("engine 0") == ["HEALTHY"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one_step", "stream"])
def test_engines_that_may_not_be_started_again(material: Path, tmp_path: Path, mode: str) -> None:
    settings = STREAM | {"sampling.mode": mode, "inference.restarts": 0, "run.resume": "auto"}
    done = recovery.run(material, tmp_path, KILLED, **settings)
    assert done.code == 75, done.said[-3000:]
    assert "0 of 1 engines are left, the run wants 1 (inference.min_engines)" in done.said
    assert "step 3 is saved" in done.said
    assert done.events("engine 0") == ["HEALTHY", "DEAD", "RETIRED"]
    assert done.left == []
    require_every_step(recovery.run(material, tmp_path, recovery.CLEAN, **settings))
