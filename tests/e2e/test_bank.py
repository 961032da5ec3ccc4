"""A stream that is stopped or killed with groups in flight goes on with what there is of them, with the real parts."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from stare_megatron.checkpoint import Outstanding, read_ahead
from stare_megatron.metrics import jsonl
from tests.e2e import test_train as demo
from tests.e2e.test_sampling_modes import STREAM
from tests.e2e.tiny_qwen2 import reference_logprobs

MORE = 3
# An engine that always has requests in flight, and the policy of every step.
SLOW: dict[str, object] = STREAM | {"inference.vllm.max_num_seqs": 24, "checkpoint.export_every": 1}
ONCE = "bank/groups", "bank/graded", "bank/partial", "bank/again"

material = demo.material


def stopped(material: Path, runs: Path, settings: dict[str, object]) -> int:
    """A run that gets SIGTERM after four steps; the step that it saved."""
    process = subprocess.Popen(
        demo.arguments(material, runs, **settings),
        cwd=demo.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = runs / "e2e/metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-3000:]
    return int((runs / "e2e/checkpoints/latest").read_text().strip().removeprefix("step_"))


def resumed(material: Path, runs: Path, settings: dict[str, object]) -> tuple[str, list[jsonl.Row]]:
    """What the run says that goes on, and all its rows."""
    command = demo.arguments(material, runs, **settings)
    again = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    return again.stdout, jsonl.read(runs / "e2e/metrics.jsonl")


def every_prompt_once(run: Path, steps: int) -> list[dict[str, Any]]:
    """All samples of a run whose every group has other prompts than all others."""
    by_step = [demo.prompts_of(run / f"samples/step_{step:06d}.jsonl") for step in range(1, steps + 1)]
    groups = [{sample["prompt_id"] for sample in samples} for samples in by_step]
    assert all(len(found) == 32 for found in groups)
    assert len(set().union(*groups)) == 32 * steps
    return [sample for samples in by_step for sample in samples]


def rescored(material: Path, run: Path, samples: list[dict[str, Any]]) -> float:
    """How far log-probs of samples are from those that each token's policy gives it, at most, nats."""

    @functools.cache
    def policy(version: int) -> Any:
        folder = run / f"exports/step_{version:06d}" if version else material / "model"
        return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(requires_grad=False)

    worst = 0.0
    for sample in samples:
        prompt, action = sample["spans"]
        tokens, at = [*prompt["token_ids"], *action["token_ids"]], 0
        for version, n in action["policy_versions"]:
            first = len(prompt["token_ids"]) - 1 + at
            want = reference_logprobs(policy(version), tokens)[first : first + n]
            worst = max(worst, float(np.abs(want - action["rollout_logprobs"][at : at + n]).max()))
            at += n
        assert at == len(action["token_ids"])
    return worst


@pytest.mark.runs
def test_a_stream_that_is_stopped_goes_on_with_what_it_had(material: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = SLOW | {"run.steps": 40, "run.resume": "auto"} | demo.EVERY_SAMPLE
    saved, run = stopped(material, tmp_path, settings), tmp_path / "e2e"
    kept = read_ahead(run / f"checkpoints/step_{saved:06d}")
    assert isinstance(kept, Outstanding)
    shelf = {int(file.stem) for file in (run / "bank" / kept.bank).iterdir()}
    partial = [(of.prompt.id, p) for of in kept.requests for p in of.begun.partial]
    assert shelf
    assert partial
    assert all(version <= saved for _, p in partial for version, _ in p.drawn.versions)

    said, rows = resumed(material, tmp_path, settings | {"run.steps": saved + MORE})
    assert [row["step"] for row in rows] == list(range(1, saved + MORE + 1))
    assert all(row["sync/staleness"] <= 2 for row in rows)
    first, others = rows[saved], rows[:saved] + rows[saved + 1 :]
    assert all(row[name] == 0 for row in others for name in ONCE)
    assert first["bank/groups"] == len(shelf)
    assert first["bank/partial"] == len(partial)
    line = f"{len(shelf)} finished groups, and of others {first['bank/graded']:.0f} finished and {len(partial)} partial"
    assert line in said
    of_request = {seed: 8 for seed in (of.sampling.seed for of in kept.requests) if seed not in shelf}
    assert sum(first[name] for name in ONCE[1:]) == sum(of_request.values())

    samples = every_prompt_once(run, saved + MORE)
    by_sample = {(s["prompt_id"], s["sample"]): s for s in samples}
    continued = [(by_sample[prompt, p.sample], p.drawn) for prompt, p in partial if (prompt, p.sample) in by_sample]
    assert len(continued) > len(partial) // 2
    for sample, drawn in continued:
        (action,) = [span for span in sample["spans"] if span["kind"] == "action"]
        assert action["token_ids"][: len(drawn.token_ids)] == drawn.token_ids.tolist()
        assert action["rollout_logprobs"][: len(drawn.logprobs)] == pytest.approx(drawn.logprobs.tolist(), abs=1e-6)
        assert len(action["token_ids"]) <= 24
    several = [s for s in samples if len(s["spans"][1]["policy_versions"]) > 1]
    assert several
    worst = rescored(material, run, [sample for sample, _ in continued] + several[:200] + samples[:50])
    print(f"{len(shelf)} groups, {len(partial)} partial, {len(several)} of several policies, {worst:.2g} nats")
    assert worst < 1e-4


@pytest.mark.runs
def test_a_stream_that_is_killed_goes_on_with_what_its_checkpoint_had(material: Path, tmp_path: Path) -> None:
    """By SIGKILL, in an update after a save: also groups that were finished since then are not sampled again."""
    settings: dict[str, object] = SLOW | {"run.steps": 7, "run.resume": "auto", "checkpoint.every": 2}
    said, code, _ = demo.killed(material, tmp_path, "update", 4, settings | demo.EVERY_SAMPLE)
    assert code == -signal.SIGKILL, said[-3000:]
    run = tmp_path / "e2e"
    said, rows = resumed(material, tmp_path, settings | demo.EVERY_SAMPLE)
    first = next(row for row in rows if row["bank/groups"])
    assert first["step"] in (3, 5)
    assert first["bank/partial"] > 0
    assert all(row["sync/staleness"] <= 2 for row in rows)
    samples = every_prompt_once(run, 7)
    assert rescored(material, run, [s for s in samples if len(s["spans"][1]["policy_versions"]) > 1][:200]) < 1e-4
    # Shelves of checkpoints that nobody goes on from are gone.
    assert len(list((run / "bank").iterdir())) <= 1
