"""A stream that is stopped goes on with what it had, with the real parts."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stare_megatron.checkpoint import Bank, Outstanding, read_ahead
from stare_megatron.metrics import jsonl
from stare_megatron.sync.check import BOUNDS
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs
from tests.e2e import test_train as demo
from tests.e2e.rescoring import EVERY_VERSION, rescored
from tests.e2e.test_sampling_modes import STREAM

pytestmark = pytest.mark.runs
MORE = 3
COUNTS = ("bank/groups", "bank/graded", "bank/partial", "bank/again")
SETTINGS: dict[str, object] = (
    STREAM
    | EVERY_VERSION
    | {
        "inference.vllm.max_num_seqs": 12,
        "rollout.dynamic_sampling": False,  # so that what goes on is learned from
        "run.resume": "auto",
    }
)

material = demo.material


def ended(
    material: Path, runs: Path, how: signal.Signals = signal.SIGTERM, steps: int = 4, **settings: object
) -> tuple[int, list[psutil.Process]]:
    """A run whose driver gets a signal after so many steps, SIGKILL once something is saved; the step that it saved,
    and all processes that it had."""
    process = subprocess.Popen(
        demo.arguments(material, runs, **SETTINGS | {"run.steps": 40} | settings),
        cwd=demo.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, latest = runs / "e2e/metrics.jsonl", runs / "e2e/checkpoints/latest"
    deadline = time.monotonic() + 1200

    def far_enough() -> bool:
        done = metrics.exists() and metrics.read_text().count("\n") >= steps
        return done and (how is signal.SIGTERM or latest.exists())

    while not far_enough() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, how)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == (130 if how is signal.SIGTERM else -how), output[-3000:]
    return int(latest.read_text().strip().removeprefix("step_")), children


def outstanding(run: Path, step: int) -> tuple[Outstanding, set[int]]:
    """What a checkpoint names, and the seeds of those that are finished and on its shelf."""
    kept = read_ahead(run / f"checkpoints/step_{step:06d}")
    assert isinstance(kept, Outstanding)
    return kept, {int(file.stem) for file in (run / "bank" / kept.bank).glob("*.npz")}


def resumed(
    material: Path, runs: Path, step: int, prompts: int = 32, **settings: object
) -> tuple[str, list[jsonl.Row], list[dict[str, Any]]]:
    """What a run says that goes on from a step, the rows of the whole run, and all its samples; every prompt is
    learned from once, and each token has the log-prob that its version's policy gives it."""
    run, last = runs / "e2e", step + MORE
    command = demo.arguments(material, runs, **SETTINGS | {"run.steps": last} | settings)
    again = programs.run(command, cwd=demo.ROOT)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    rows = jsonl.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    assert all(row["sync/staleness"] <= 2 for row in rows)
    assert all(row[name] == 0 for row in rows if row["step"] != step + 1 for name in COUNTS)
    by_step = [demo.prompts_of(run / f"samples/step_{number:06d}.jsonl") for number in range(1, last + 1)]
    groups = [{sample["prompt_id"] for sample in samples} for samples in by_step]
    assert all(len(found) == prompts for found in groups)
    assert len(set().union(*groups)) == prompts * last
    assert max(stretch.gap for stretch in rescored(run, material / "model")) < BOUNDS["float32"]
    return again.stdout, rows, [sample for samples in by_step for sample in samples]


def test_a_stream_that_is_stopped_goes_on_with_what_it_had(material: Path, tmp_path: Path) -> None:
    for runs in (tmp_path / "1", tmp_path / "2", tmp_path / "3"):  # an end may come when no group has just finished
        saved, left = ended(material, runs)
        demo.require_gone(left)
        kept, shelf = outstanding(runs / "e2e", saved)
        if shelf:
            break
    assert shelf
    said, rows, _ = resumed(material, runs, saved)
    assert f"{len(shelf)} finished groups, and of others" in said
    first = rows[saved]
    assert first["bank/groups"] == len(shelf)
    assert sum(first[name] for name in COUNTS[1:]) == 8 * (len(kept.requests) - len(shelf))


# A model that has learned nothing ends a response at one token in a hundred: some are cut off. Two sequences at a time
# are drawn of up to 48, and a batch takes some 800 iterations: the engine is at some at any moment.
LONGEST = 256
LONG: dict[str, object] = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_response_tokens": LONGEST,
    "reward.name": "length",
    "reward.limit": LONGEST,
    "reward.buffer": LONGEST,
    "inference.vllm.max_num_seqs": 2,
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model and prompts for it."""
    folder = tmp_path_factory.mktemp("talker") / "material"
    settings = dataclasses.replace(default_settings("order_free_sum", layers=2, seed=1), max_batches=0)
    make(settings, folder, 512, 32)
    return folder


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_what_is_under_way_is_gone_on_with(talker: Path, tmp_path: Path, how: signal.Signals) -> None:
    """SIGTERM: what there is at the last save. SIGKILL of the driver: what the policies of the newest checkpoint had
    drawn when it was written, and what they finished since; no more."""
    settings = LONG | {"checkpoint.every": 0 if how is signal.SIGTERM else 1}
    saved, left = ended(talker, tmp_path, how, steps=2, **settings)
    kept, _ = outstanding(tmp_path / "e2e", saved)
    # As if it had ended at once: what was under way at the save may have been finished while the run ended.
    for of in kept.requests:
        if of.begun.partial:
            (tmp_path / "e2e/bank" / kept.bank / f"{of.sampling.seed}.npz").unlink(missing_ok=True)
    kept, shelf = outstanding(tmp_path / "e2e", saved)
    bank = Bank(tmp_path / "e2e/bank")
    finished = [t for seed in shelf for t in bank.take(kept.bank, seed).group.trajectories]
    open_ = [of for of in kept.requests if of.sampling.seed not in shelf]
    finished += [of.trajectory for request in open_ for of in request.begun.graded]
    partial = {(of.prompt.id, p.sample): p.drawn for of in open_ for p in of.begun.partial}
    assert partial

    _, rows, samples = resumed(talker, tmp_path, saved, prompts=4, **settings)
    demo.require_gone(left)
    first = rows[saved]
    assert [first[name] for name in COUNTS[:3]] == [len(shelf), sum(len(of.begun.graded) for of in open_), len(partial)]
    assert first["bank/again"] == 4 * len(open_) - first["bank/graded"] - first["bank/partial"]
    learned = {(s["prompt_id"], s["sample"]): s["spans"][1] for s in samples if s["step"] > saved}
    for of in finished:
        assert learned[of.prompt_id, of.sample]["token_ids"] == of.spans[1].token_ids.tolist()
    for key, drawn in partial.items():
        n, action = len(drawn.token_ids), learned[key]
        assert action["token_ids"][:n] == drawn.token_ids.tolist()
        assert action["rollout_logprobs"][:n] == pytest.approx(drawn.logprobs.tolist(), rel=1e-6)
        versions = [version for version, tokens in action["policy_versions"] for _ in range(tokens)]
        assert versions[:n] == [version for version, tokens in drawn.versions for _ in range(tokens)]
        assert all(version >= saved for version in versions[n:])
    # Whoever goes on has what is left of the budget.
    lengths = [sum(len(span["token_ids"]) for span in s["spans"] if span["kind"] == "action") for s in samples]
    assert max(lengths) == LONGEST
    assert all(n == LONGEST for n, s in zip(lengths, samples, strict=True) if s["status"] == "truncated")
