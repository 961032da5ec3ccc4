"""Processes of a real run are killed and stopped: what the run makes of it, and that nothing is left. Which and
when: TABLE has an engine's actor and core in a rollout, an update and a push, ranks in these and (killed) in a scoring
pass.

Two engines, two ranks that split layers, a checkpoint every second step.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.metrics.events import FILE
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings

ROOT = Path(__file__).parents[2]
STEPS = 5
CLEAN = "engine_0:CONT:rollout:0"  # nothing happens


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery") / "material"
    make(default_settings("order_free_sum", layers=2, seed=1), folder, 512, 32)
    return folder


@dataclass
class Done:
    """A run that has ended. `left`: its processes that live on."""

    code: int
    said: str
    folder: Path
    left: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[jsonl.Row]:
        return jsonl.read(self.folder / "metrics.jsonl")

    def events(self, who: str) -> list[str]:
        """The states that somebody came to."""
        rows = map(json.loads, (self.folder / FILE).read_text().splitlines())
        return [row["new"] for row in rows if row["who"] == who]


def run(material: Path, runs: Path, faults: str, **settings: object) -> Done:
    keys: dict[str, object] = {
        "run.dir": runs,
        "run.name": "r",
        "run.steps": STEPS,
        "model.path": material / "model",
        "data.train": json.dumps([str(material / "train.jsonl")]),
        "rollout.prompts_per_step": 8,
        "inference.engines": 2,
        "inference.answer_timeout": 600,  # an engine that is slow for a tenth of it is SUSPECT
        "checkpoint.every": 2,
        "checkpoint.export_final": "false",
        "logging.wandb": "disabled",
    } | settings
    script, example = str(ROOT / "tests/e2e/faulty_run.py"), str(ROOT / "examples/demo_cpu/run.toml")
    command = [sys.executable, script, faults, "train", example, "--quiet", *(f"{k}={v}" for k, v in keys.items())]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    children: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            children |= {p.pid: p for p in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.2)
    process.kill()
    said = process.communicate()[0]
    _, alive = psutil.wait_procs(list(children.values()), timeout=300)
    for left in alive:
        left.kill()
    return Done(process.returncode, said, runs / "r", [p.name() for p in alive])


# What is due is on disk before the next step begins.
SAVED: dict[str, object] = {"checkpoint.asynchronous": "false"}


def learned(rows: list[jsonl.Row]) -> list[dict[str, Any]]:
    """What a step found and did."""
    names = ("step", "reward/mean", "response/length_mean", "policy/entropy", "update/grad_norm", "sync/weight_version")
    return [{name: pytest.approx(row[name], rel=1e-4) for name in names} for row in rows]


def require_whole(done: Done, clean: Done | None = None) -> None:
    """Every step is there once, right, and nothing is left running."""
    assert done.code == 0, done.said[-4000:]
    assert [row["step"] for row in done.rows] == list(range(1, len(done.rows) + 1))
    assert all(row["mismatch/mean"] < 1e-3 and row["sync/probe"] < 1e-3 for row in done.rows)
    assert done.left == []
    if clean:
        assert [{k: row[k] for k in want} for row, want in zip(done.rows, learned(clean.rows), strict=True)] == learned(
            clean.rows
        )


@pytest.fixture(scope="module")
def clean(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What the run is when nothing happens to it."""
    done = run(material, tmp_path_factory.mktemp("clean"), CLEAN)
    require_whole(done)
    assert done.events("engine 0") == done.events("engine 1") == ["HEALTHY"]
    assert all(row["fleet/healthy"] == 2 and not row["fleet/groups_again"] for row in done.rows)
    return done


@pytest.mark.runs
def test_a_run_outlives_an_engine_and_a_rank(material: Path, tmp_path: Path) -> None:
    """The only engine is killed while it samples, then a rank in an update: groups are sampled again by the engine that
    comes back, the ranks go on from the last checkpoint."""
    done = run(
        material,
        tmp_path,
        "engine_0:KILL:rollout:1,trainer_1:KILL:update:3",
        **{"inference.engines": 1, "run.steps": 4, "rollout.prompts_per_step": 16, "inference.vllm.max_num_seqs": 4}
        | SAVED,
    )
    require_whole(done)
    assert done.events("engine 0") == ["HEALTHY", "DEAD", "RESTARTING", "STALE", "HEALTHY"]
    assert done.events("trainer ranks") == ["DEAD", "RESTARTING", "HEALTHY"]
    assert "engine 0 on" in done.said
    assert "trainer ranks: RESTARTING -> HEALTHY: going on from step 2" in done.said
    second = done.rows[1]
    assert second["fleet/restarts"] == 1
    assert second["fleet/groups_again"] > 0  # some may be done before the kill


# Whom, how, when, what then: `again` an engine is lost and started again; `ranks` they are.
TABLE = [
    *((f"{who}_1", "KILL", phase, "again") for who in ("engine", "core") for phase in ("rollout", "update", "push")),
    *((f"{who}_1", "STOP", phase, "again") for who in ("engine", "core") for phase in ("rollout", "update", "push")),
    *(("trainer_1", "KILL", phase, "ranks") for phase in ("rollout", "score", "update", "push")),
    ("trainer_0", "KILL", "push", "ranks"),
    *(("trainer_1", "STOP", phase, "ranks") for phase in ("rollout", "update", "push")),
]


# How weights travel makes a difference in a push.
ROWS = [(*row, method) for row in TABLE for method in ("whole", "sharded") if method == "whole" or row[2] == "push"]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "how", "phase", "then", "method"), ROWS)
def test_whatever_is_lost(
    material: Path, clean: Done, tmp_path: Path, target: str, how: str, phase: str, then: str, method: str
) -> None:
    settings: dict[str, object] = {"sync.method": method}
    if how == "STOP":  # who is only slow may be SUSPECT meanwhile
        settings["inference.answer_timeout"] = 10
    done = run(material, tmp_path, f"{target}:{how}:{phase}:2", **settings)
    require_whole(done, clean)
    if then == "ranks":
        assert done.events("trainer ranks") == ["DEAD", "RESTARTING", "HEALTHY"]
        assert "DEAD" not in done.events("engine 0") + done.events("engine 1")
        return
    assert done.events("trainer ranks") == []
    assert "DEAD" not in done.events("engine 0")
    states = [state for state in done.events("engine 1") if state != "SUSPECT"]
    assert states[:2] == ["HEALTHY", "DEAD"]
    assert "SUSPECT" in done.events("engine 1") or how != "STOP"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["whole", "sharded"])
def test_an_engine_joins_again_and_another_is_lost(material: Path, tmp_path: Path, method: str) -> None:
    """The one that came back serves alone while the other is away."""
    settings: dict[str, object] = {"run.steps": 60, "sync.method": method}
    done = run(material, tmp_path, "engine_1:KILL:update:1,core_0:KILL:rollout:40", **settings)
    require_whole(done)
    assert done.events("engine 1") == ["HEALTHY", "DEAD", "RESTARTING", "STALE", "HEALTHY"]
    assert done.events("engine 0")[:2] == ["HEALTHY", "DEAD"]


@pytest.mark.slow
def test_too_few_engines_end_the_run_for_a_scheduler_to_start_again(
    material: Path, clean: Done, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"inference.restarts": 0, "inference.min_engines": 2, "run.resume": "auto"}
    done = run(material, tmp_path, "core_1:KILL:rollout:3", **settings)
    assert done.code == 75, done.said[-3000:]
    assert "the run stopped: engine 1: its vLLM process died" in done.said
    assert "1 of 2 engines are left, the run wants 2 (inference.min_engines)" in done.said
    assert "step 3 is saved" in done.said
    assert done.events("engine 1") == ["HEALTHY", "DEAD", "RETIRED"]
    assert done.left == []
    require_whole(run(material, tmp_path, CLEAN, **settings), clean)


@pytest.mark.slow
def test_ranks_that_may_not_be_started_again(material: Path, clean: Done, tmp_path: Path) -> None:
    settings: dict[str, object] = {"run.restarts": 0, "run.resume": "auto"}
    done = run(material, tmp_path, "trainer_1:KILL:update:3", **settings)
    assert done.code == 75, done.said[-3000:]
    assert "the run stopped: trainer rank 1: its process died" in done.said
    assert done.left == []
    require_whole(run(material, tmp_path, CLEAN, **settings), clean)
