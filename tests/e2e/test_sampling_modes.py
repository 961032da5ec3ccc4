"""Sampling while the trainer works, with the real parts: what is trained does not depend on time, nor on a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl, trace
from stare_megatron.types.report import Activity
from tests import programs
from tests.e2e import test_train as demo

STEPS = 6
ONE_STEP: dict[str, object] = {
    "sampling.mode": "one_step",
    "inference.placement": "separate",
    "algorithm.correction.mode": "truncate",
}

material = demo.material


@pytest.fixture(scope="module")
def ahead(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in `one_step` mode."""
    runs = tmp_path_factory.mktemp("ahead")
    command = demo.arguments(material, runs, **{"run.steps": STEPS}, **demo.EVERY_SAMPLE, **ONE_STEP)
    done = programs.run(command, cwd=demo.ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "e2e"


@pytest.mark.runs
def test_every_batch_but_the_first_is_of_the_policy_before(ahead: Path) -> None:
    rows = jsonl.read(ahead / "metrics.jsonl")
    assert [row["sync/staleness"] for row in rows] == [0, *[1] * (STEPS - 1)]
    assert [row["sync/weight_version"] for row in rows] == list(range(1, STEPS + 1))
    # Engine and trainer agree where they have the same weights, and differ by an update's worth where they do not.
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    assert rows[0]["mismatch/mean"] < 1e-3
    assert all(1e-3 < row["mismatch/mean"] < 0.3 for row in rows[1:])
    assert all(row["correction/mean"] != 1 for row in rows[1:])


@pytest.mark.runs
def test_engines_sample_while_ranks_work(ahead: Path) -> None:
    def together(a: Activity, b: Activity) -> bool:
        return a.start < b.end and b.start < a.end

    steps = [s for s in trace.read(ahead)[:-1] if s.step]  # nobody samples beside the last
    assert len(steps) == STEPS - 1
    beside = []
    for step in steps:
        sampled = [a for a in step.tracks["engine 0"] if a.name == "sample"]
        worked = [a for a in step.tracks["trainer rank 0"] if a.name in ("load", "score", "update")]
        assert sampled
        assert worked
        beside.append(any(together(a, b) for a in sampled for b in worked))
    assert sum(beside) > len(beside) / 2, beside  # ranks that got no processor for long may find a whole batch


@pytest.mark.runs
def test_killed_in_an_update_it_goes_on_with_the_batch_in_hand(material: Path, ahead: Path, tmp_path: Path) -> None:
    demo.killed_and_resumed(material, ahead, tmp_path, "update", 4, STEPS, **ONE_STEP)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rollout", "score", "push", "save", "latest"])
def test_killed_in_a_phase(material: Path, ahead: Path, tmp_path: Path, phase: str) -> None:
    demo.killed_and_resumed(material, ahead, tmp_path, phase, 4, STEPS, **ONE_STEP)


def trained(material: Path, runs: Path, **settings: object) -> list[jsonl.Row]:
    """The metrics of a run of STEPS steps in `runs`."""
    command = demo.arguments(material, runs, **{"run.steps": STEPS} | demo.EVERY_SAMPLE | settings)
    done = programs.run(command, cwd=demo.ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return jsonl.read(runs / "e2e/metrics.jsonl")


@pytest.mark.runs
def test_a_stream_without_staleness_is_the_synchronous_run(material: Path, tmp_path: Path) -> None:
    """Bit for bit: every metric but costs, every token of every sample."""
    stream: dict[str, object] = {"sampling.mode": "stream", "sampling.max_staleness": 0}
    sync, mine = (
        [demo.learned(row) for row in trained(material, tmp_path / name, **settings)]
        for name, settings in (("sync", {}), ("stream", stream))
    )
    assert mine == sync
    for step in range(1, STEPS + 1):
        a, b = ((tmp_path / name / f"e2e/samples/step_{step:06d}.txt").read_text() for name in ("sync", "stream"))
        assert a.count("===") >= 256
        assert a == b


STREAM = ONE_STEP | {"sampling.mode": "stream", "sampling.max_staleness": 2}
# So few sequences at a time that a batch takes hundreds of iterations: the engine is at some when a push comes, or when
# it has to give its devices up, on fast machines and slow ones.
SLOW_ENGINE: dict[str, object] = {"inference.vllm.max_num_seqs": 8}


@pytest.mark.runs
def test_a_stream_that_is_killed_learns_from_every_prompt_once(material: Path, tmp_path: Path) -> None:
    settings = STREAM | SLOW_ENGINE | {"run.steps": STEPS, "run.resume": "auto", "checkpoint.every": 2}
    runs = tmp_path / "runs"
    said, code, _ = demo.killed(material, runs, "update", 4, settings | demo.EVERY_SAMPLE)
    assert code == -signal.SIGKILL, said[-3000:]
    rows = trained(material, runs, **settings)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/staleness"] <= 2 for row in rows)
    assert any(row["sync/staleness"] > 0 for row in rows)
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    assert rows[0]["mismatch/mean"] < 1e-3
    # Tokens of several ages, and sequences that a push went through.
    assert any(row["sync/version_spans_max"] > 1 for row in rows)
    assert all(0 < row["sync/staleness_mean"] <= row["sync/staleness"] for row in rows if row["sync/staleness"])
    for row in rows:
        counts = {age: row[name] for age in range(3) if (name := f"age/{age}/tokens") in row}
        assert sum(counts.values()) == row["throughput/trained_tokens"]
        whole = sum(row[f"age/{age}/entropy"] * n for age, n in counts.items()) / sum(counts.values())
        assert whole == pytest.approx(row["policy/entropy"], rel=1e-6)
        assert row["age/0/mismatch"] < 1e-3 if 0 in counts else True
    # 512 prompts, of which fewer are drawn: whoever comes twice was learned from twice.
    files = sorted((runs / "e2e/samples").glob("step_*.jsonl"))
    assert len(files) == STEPS
    groups = [{sample["prompt_id"] for sample in demo.prompts_of(file)} for file in files]
    assert all(len(found) == 32 for found in groups)
    assert len(set().union(*groups)) == 32 * STEPS
    state = json.loads((runs / f"e2e/checkpoints/step_{STEPS:06d}/loop.json").read_text())["stream"]
    assert state["epoch"] == 0
    assert state["cursor"] == 32 * STEPS + sum(row["groups/dropped"] for row in rows)


@pytest.mark.runs
def test_on_shared_devices_what_is_sampled_beyond_a_batch_goes_on_in_the_next_step(
    material: Path, tmp_path: Path
) -> None:
    """Engines that give their devices up to the trainer keep what they are at, and half a batch more is begun."""
    shared: dict[str, object] = {
        "inference.placement": "colocated",
        "sampling.max_staleness": 1,
        "sampling.over_sampling": 0.5,
    }
    rows = trained(material, tmp_path, **STREAM | SLOW_ENGINE | shared)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["sync/staleness"] for row in rows} == {0, 1}
    assert any(row["sync/version_spans_max"] > 1 for row in rows)
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    assert all(row["age/0/mismatch"] < 1e-3 for row in rows if "age/0/mismatch" in row)
    files = sorted((tmp_path / "e2e/samples").glob("step_*.jsonl"))
    groups = [{sample["prompt_id"] for sample in demo.prompts_of(file)} for file in files]
    assert len(set().union(*groups)) == 32 * STEPS
