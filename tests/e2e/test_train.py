"""The whole loop with the real parts: Ray, a vLLM engine, two Megatron-Core ranks, on a model that can learn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from stare_megatron.metrics import jsonl, trace
from stare_megatron.metrics.catalogue import COSTS
from stare_megatron.tasks.make import make
from stare_megatron.tasks.smollm2 import make_smollm2
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs

ROOT = Path(__file__).parents[2]
STEPS = 24
EVERY_SAMPLE: dict[str, object] = {"logging.samples_every": 1, "logging.samples": 4096}
COMMAND = [sys.executable, "-m", "stare_megatron", "train", str(ROOT / "examples/demo_cpu/run.toml"), "--quiet"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its prompts, made as the demo makes them but from another seed."""
    folder = tmp_path_factory.mktemp("e2e") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


def arguments(material: Path, runs: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "e2e",
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "logging.wandb": "disabled",
        "trainer.tensor_parallel": 2,
        "checkpoint.every": 0,
    } | overrides
    return [*COMMAND, *(f"{key}={value}" for key, value in keys.items())]


def held_out(material: Path) -> dict[str, object]:
    return {"eval.benchmarks": json.dumps([str(material / "eval.jsonl")]), "eval.samples": 16, "eval.every": 4}


@pytest.fixture(scope="module")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of STEPS steps, evaluated every fourth."""
    runs = tmp_path_factory.mktemp("trained")
    command = arguments(material, runs, **{"run.steps": STEPS}, **held_out(material), **EVERY_SAMPLE)
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "e2e"


def test_stare_trains(material: Path, trained: Path) -> None:
    """Reward rises, engine and trainer agree at every step, the engine's weights change, all files are there."""
    run = trained
    rows = jsonl.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))

    first = sum(row["reward/mean"] for row in rows[:4]) / 4
    last = sum(row["reward/mean"] for row in rows[-4:]) / 4
    # 4 steps are some 1,280 samples: the standard error of such a mean is below 0.014.
    assert last - first >= 0.1, f"reward {first:.3f} -> {last:.3f}"

    assert all(row["mismatch/mean"] < 1e-3 for row in rows)
    assert all(row["sync/probe"] < 1e-3 for row in rows)
    # Had a push not reached the engine, its samples would come from old weights and the mismatch would grow.
    assert [row["sync/weight_version"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/staleness"] == 0 for row in rows)
    assert any(row["stare/gate"] for row in rows) or min(row["policy/entropy"] for row in rows) >= 0.2

    before, after = (load_file(folder / "model.safetensors") for folder in (material / "model", run / "hf"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    for name in ("config.toml", "run.json", "curves.png", "samples", "tensorboard", "checkpoints/latest", "logs"):
        assert (run / name).exists(), name


def test_the_trace_of_a_run_is_whole(trained: Path) -> None:
    """Every group is sampled in an engine and leads to its update; the phases fill the step, and nobody is busy for
    longer."""
    rows = {int(row["step"]): row for row in jsonl.read(trained / "metrics.jsonl")}
    steps = [s for s in trace.read(trained) if s.step in rows]
    assert [s.step for s in steps] == list(rows)
    filled = 0.0
    for s in steps:
        row, (whole, *phases) = rows[s.step], s.tracks["driver"]
        inside = sum(p.seconds for p in phases)
        assert inside <= whole.seconds
        filled += inside / whole.seconds
        sampled = [a.detail for a in s.tracks["engine 0"] if a.name == "sample"]
        assert len(sampled) >= row["groups/sampled"]  # and those of an evaluation
        assert set(s.trained) <= set(sampled)
        assert {"load", "score", "update", "push"} <= {a.name for a in s.tracks["trainer rank 0"]}
        assert 0 < row["idle/engines"] < 1
        assert 0 < row["idle/trainers"] < 1
        assert 0 < row["engine/kv_use"] <= row["engine/kv_use_max"] <= 1
        assert row["engine/requests"] > 0
    assert filled > 0.6 * STEPS  # the rest: metrics, and here every sample of the step
    arrows = [e for e in trace.events(steps) if e["ph"] == "s"]
    # A prompt that came twice in a step, and was dropped once, has two.
    assert 0 <= len(arrows) - sum(len(s.trained) for s in steps) < 24


def test_samples_hold_what_engine_and_trainer_knew(trained: Path) -> None:
    """Of every trained trajectory: both log-probs of each action token, and a selection on the advantage's side whose
    size and weight are the step's."""
    for row in jsonl.read(trained / "metrics.jsonl"):
        samples = prompts_of(trained / f"samples/step_{int(row['step']):06d}.jsonl")
        assert len(samples) == 256
        selection: list[int] = []
        for sample in samples:
            for span in sample["spans"]:
                if span["kind"] != "action":
                    continue
                assert span["raw_logprobs"] == pytest.approx(span["rollout_logprobs"], abs=1e-3)
                assert all(sign * sample["advantage"] >= 0 for sign in span["selection"])
                chosen = [w for w, sign in zip(span["weights"], span["selection"], strict=True) if sign > 0]
                assert chosen == pytest.approx([row["stare/weight_pos"]] * len(chosen))
                selection += span["selection"]
        assert selection.count(1) == row["stare/selected_pos"]
        assert selection.count(-1) == row["stare/selected_neg"]


def learned(row: jsonl.Row) -> dict[str, str]:
    """What a step found and did, without what it cost; as text, since NaN is not equal to itself."""
    return {name: repr(x) for name, x in row.items() if not name.startswith(COSTS)}


def prompts_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_is_evaluated(trained: Path) -> None:
    """At the start, every fourth step and at the end; accuracy rises with the reward, and the record is whole."""
    rows = jsonl.read(trained / "eval.jsonl")
    assert [row["step"] for row in rows] == list(range(0, STEPS + 1, 4))
    # 32 prompts of 16 samples, the same prompts and seeds at both ends: a standard error of some 0.02.
    assert rows[-1]["eval/eval/avg@16"] - rows[0]["eval/eval/avg@16"] >= 0.05
    for row in rows:
        assert row["eval/eval/ungraded"] == 0
        for name in ("avg@16", "pass@1", "pass@4", "pass@16", "greedy"):
            assert row[f"eval/eval/{name}/ci_low"] <= row[f"eval/eval/{name}"] <= row[f"eval/eval/{name}/ci_high"]
        assert row["eval/eval/pass@1"] <= row["eval/eval/pass@4"] <= row["eval/eval/pass@16"]
    graded = prompts_of(trained / f"eval/step-{STEPS:06d}/eval.jsonl")
    assert len(graded) == 64
    shares = [sum(g["correct"]) / 16 for g in graded if g["setting"] == "sampled"]
    assert rows[-1]["eval/eval/avg@16"] == pytest.approx(sum(shares) / 32)
    steps = jsonl.read(trained / "metrics.jsonl")
    # Seconds of saving and evaluating stand where they were spent, at the last step too; those before step 1 nowhere.
    assert [row["step"] for row in steps if row["time/eval"]] == list(range(4, STEPS + 1, 4))
    assert steps[-1]["time/save"] > 0
    assert all(row["source/order_free_sum/reward"] == pytest.approx(row["reward/mean"]) for row in steps)


def test_an_evaluation_alone_is_the_one_of_the_run(material: Path, trained: Path, tmp_path: Path) -> None:
    """The exported policy, in an engine that loads it from disk, gives the responses of the run's last evaluation."""
    out = tmp_path / "alone"
    command = [sys.executable, "-m", "stare_megatron", "eval", COMMAND[4], "--model", str(trained), "--out", str(out)]
    keys: dict[str, object] = {"run.dir": tmp_path, "model.path": "none", "data.train": '["none"]'} | held_out(material)
    done = programs.run(
        [*command, *(f"{key}={value}" for key, value in keys.items())],
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "avg@16" in done.stdout
    mine, runs = (prompts_of(f / "eval.jsonl") for f in (out / "responses", trained / f"eval/step-{STEPS:06d}"))
    assert mine == runs


def require_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=300)  # Ray's agents outlive a killed driver by a minute and more
    assert not alive, [p.name() for p in alive]


@pytest.mark.runs
def test_interrupt_saves_and_resume_goes_on(material: Path, trained: Path, tmp_path: Path) -> None:
    """SIGTERM, for which Ray has a handler too, ends the step as Ctrl-C does, saves, and leaves no process;
    `run.resume=auto` goes on from there at another layout, and without a scoring pass.

    Up to there the run has no evaluation, and is bit for bit the one that has.
    """
    run = tmp_path / "e2e"
    settings: dict[str, object] = {"run.steps": 40}
    process = subprocess.Popen(
        arguments(material, tmp_path, **settings), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 1200
    metrics = run / "metrics.jsonl"
    # Until the other run has been evaluated twice.
    while not (metrics.exists() and metrics.read_text().count("\n") > 4) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output[-3000:]
    require_gone(children)

    saved = int((run / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    logged = metrics.read_text()
    assert jsonl.read(metrics)[-1]["step"] == saved
    both = min(saved, STEPS)  # the signal may be late
    mine, theirs = ([learned(row) for row in jsonl.read(f / "metrics.jsonl")[:both]] for f in (run, trained))
    assert len(mine) == both > 4
    assert mine == theirs

    layout: dict[str, object] = {
        "run.steps": saved + 2,
        "run.resume": "auto",
        "trainer.tensor_parallel": 1,
        "trainer.pipeline_parallel": 2,
        "trainer.scoring": "rollout",
    }
    refused = programs.run(arguments(material, tmp_path, **settings | layout), cwd=ROOT)
    assert refused.returncode == 2
    assert 'trainer.scoring was "trainer", is "rollout"' in refused.stderr
    layout["run.resume_allow"] = '["trainer.scoring"]'
    settings |= held_out(material) | {"eval.every": 1} | layout
    again = programs.run(arguments(material, tmp_path, **settings), cwd=ROOT)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert metrics.read_text().startswith(logged)
    resumed = jsonl.read(metrics)
    assert [row["step"] for row in resumed] == list(range(1, saved + 3))
    # The evaluation of the step it goes on from was due, and is made up for.
    assert [row["step"] for row in jsonl.read(run / "eval.jsonl")] == [saved, saved + 1, saved + 2]
    # A model that was not restored, or pushed wrongly, would disagree with what the engine sampled.
    assert all(row["mismatch/mean"] < 1e-3 for row in resumed)
    # Measured in the update pass without a scoring pass, and not made up: the gate read the engine's surprisal instead.
    for row in resumed[-2:]:
        assert row["policy/entropy_estimate"] == pytest.approx(row["policy/surprisal"], abs=1e-3)
        assert 0 < abs(row["policy/entropy_estimate_error"]) < 0.2
        assert row["stare/gate"] == (row["policy/entropy_estimate"] < row["policy/target_entropy"])


def killed(
    material: Path, runs: Path, phase: str, step: int, settings: dict[str, object]
) -> tuple[str, int, list[psutil.Process]]:
    """A run that `killed_run.py` ends: what it said, its exit code, and all processes that it had."""
    script = str(ROOT / "tests/e2e/killed_run.py")
    # The whole group: a run started in a shell, and its job killed.
    process = subprocess.Popen(
        [sys.executable, script, phase, str(step), *arguments(material, runs, **settings)[3:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    children: dict[int, psutil.Process] = {}
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children |= {p.pid: p for p in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.2)
    return process.communicate()[0], process.returncode, list(children.values())


def killed_and_resumed(
    material: Path, trained: Path, runs: Path, phase: str, step: int, steps: int, **others: object
) -> None:
    """A run of `steps` steps, killed by SIGKILL in a phase, goes on as the uninterrupted one, bit for bit; with
    `engine` only the engine is killed, and the run stops. `others`: settings of both."""
    settings = {"run.steps": STEPS, "run.resume": "auto", "checkpoint.every": 2} | EVERY_SAMPLE | others
    settings["inference.restarts"] = 0
    said, code, children = killed(material, runs, phase, step, settings)
    assert code == (75 if phase == "engine" else -signal.SIGKILL), said[-3000:]
    run = runs / "e2e"
    newest = (run / "checkpoints/latest").read_text().strip()
    if phase == "latest":
        assert newest < f"step_{step:06d}"
        newest = f"step_{step:06d}"
    if phase == "engine":
        assert f"step {step} is saved" in said
        assert newest == f"step_{step:06d}"
    assert int(newest.removeprefix("step_")) <= step

    # At once: what is left of the dead run does not disturb the new one.
    again = programs.run(
        arguments(material, runs, **settings | {"run.steps": steps}),
        cwd=ROOT,
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"restoring {run / 'checkpoints' / newest}" in again.stdout
    require_gone(children)

    mine, theirs = ([learned(row) for row in jsonl.read(f / "metrics.jsonl")[:steps]] for f in (run, trained))
    assert len(mine) == steps
    assert mine == theirs
    for number in range(1, steps + 1):
        mine, theirs = ((f / f"samples/step_{number:06d}.txt").read_text() for f in (run, trained))
        assert mine.count("===") >= 256
        assert mine == theirs


@pytest.mark.runs
def test_killed_before_a_checkpoint_has_its_name(material: Path, trained: Path, tmp_path: Path) -> None:
    killed_and_resumed(material, trained, tmp_path, "save", 4, steps=6)
    assert sorted(p.name for p in (tmp_path / "e2e/checkpoints").iterdir()) == ["latest", "step_000004", "step_000006"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rollout", "score", "update", "push"])
def test_killed_in_a_phase(material: Path, trained: Path, tmp_path: Path, phase: str) -> None:
    killed_and_resumed(material, trained, tmp_path, phase, 4, steps=6)


@pytest.mark.slow
def test_a_dead_engine_costs_no_step(material: Path, trained: Path, tmp_path: Path) -> None:
    killed_and_resumed(material, trained, tmp_path, "engine", 3, steps=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_pretrained_model_trains(tmp_path: Path) -> None:
    """Two steps of the example on SmolLM2-135M, heads padded for TP=2: real weights, real tokenizer, stop string."""
    checkpoint = tmp_path / "smollm2"
    make_smollm2(checkpoint, padded=True, train_prompts=64, eval_prompts=8)
    keys = {
        "run.dir": tmp_path / "runs",
        "run.name": "smollm2",
        "run.steps": 2,
        "model.path": checkpoint / "model",
        "data.train": json.dumps([str(checkpoint / "train.jsonl")]),
        "rollout.prompts_per_step": 4,
        "logging.wandb": "disabled",
        "checkpoint.export_final": "false",
    }
    example = str(ROOT / "examples/smollm2_arithmetic/run.toml")
    command = [sys.executable, "-m", "stare_megatron", "train", example, "--quiet"]
    done = programs.run(
        [*command, *(f"{key}={value}" for key, value in keys.items())],
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(tmp_path / "runs/smollm2/metrics.jsonl")
    assert len(rows) == 2
    assert all(row["mismatch/mean"] < 1e-3 and row["sync/probe"] < 1e-3 for row in rows)
    assert rows[0]["reward/mean"] > 0.3  # the pretrained model can do much of it
