"""A whole run whose reward is `code`: a policy that writes programs, the sandbox, the tests that come with problems."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from stare_megatron import tasks
from stare_megatron.metrics import jsonl
from stare_megatron.tasks.tiny_model import _supervised, default_settings, make_model, make_tokenizer, save
from tests import programs
from tests.contracts.source import ROOT

pytestmark = pytest.mark.runs

STEPS = 3
DIGITS = range(2, 10)
LEARNED = 120  # batches


def program(digit: int) -> str:
    return f"```\nprint({digit})\n```"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `7=` with a program that prints 7, mostly; problems that want that, and as many that want
    what it does not print."""
    folder = tmp_path_factory.mktemp("code")
    settings = dataclasses.replace(default_settings("tool_arithmetic", layers=2, seed=1), max_batches=0)
    model, tokenizer = make_model(settings), make_tokenizer(tasks.get("tool_arithmetic"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, labels = _supervised(tokenizer, [(f"{d}=", [(program(d), "")]) for d in DIGITS])
    for _ in range(LEARNED):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    save(model, tokenizer, folder / "model")
    rows = [
        {"id": f"{digit}-{wanted}", "prompt": f"{digit}=", "answer": str(digit), "tests": tests}
        for digit in DIGITS
        for wanted, tests in (
            ("same", {"inputs": [""], "outputs": [f"{digit}\n"]}),
            ("other", {"inputs": [""], "outputs": [f"{digit + 10}\n"]}),
        )
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        f"""
        run = {{dir = "{folder / "runs"}", name = "code", steps = {STEPS}}}
        model = {{path = "{folder / "model"}", dtype = "float32"}}
        data = {{train = "{folder / "problems.jsonl"}", max_prompt_tokens = 8}}
        reward = {{name = "code", test_seconds = 30.0}}
        sandbox = {{workers = 2, preload = [], wall_seconds = 60}}
        rollout = {{prompts_per_step = 16, group_size = 4, max_response_tokens = 40, dynamic_sampling = false}}
        algorithm.method = "grpo"
        trainer = {{micro_batch_tokens = 1024, optimizer = {{lr = 1e-4}}}}
        checkpoint.every = 0
        eval = {{benchmarks = ["{folder / "problems.jsonl"}"], samples = 2, at_start = false}}
        logging = {{wandb = "disabled", tensorboard = false, samples_every = 1}}
        """
    )
    return folder


@pytest.mark.timeout(1800)
def test_programs_are_run_graded_and_logged(material: Path) -> None:
    command = [sys.executable, "-m", "stare_megatron", "train", str(material / "run.toml"), "--quiet"]
    done = programs.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = material / "runs/code"
    rows = jsonl.read(run / jsonl.FILE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        # Half of the problems want what the policy prints, and each of the 16 is in every step.
        assert 0.2 < row["reward/mean"] <= 0.5
        assert row["response/ungraded"] == 0
        assert row["response/failed"] == 0
    assert (run / "hf/model.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["starts"][0]["sandbox"].startswith("level ")
    graded = [json.loads(line) for line in (run / f"eval/step-{STEPS:06d}/problems.jsonl").read_text().splitlines()]
    assert len(graded) == 2 * 16  # sampled and greedy
    for row in graded:
        if row["id"].endswith("-other"):
            assert not any(row["correct"])
    greedy = [row for row in graded if row["setting"] == "greedy"]
    right = [row for row in greedy if row["correct"] == [True]]
    assert len(right) >= 6, "all that its programs print is right"
    wrong = next(row for row in greedy if row["id"] == right[0]["id"].replace("same", "other"))
    assert wrong["responses"] == right[0]["responses"]
    assert wrong["note"][0].startswith("test 1 of 1: ")
