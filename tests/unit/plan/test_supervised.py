"""The plan of a supervised run: a file with a table [sft]."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stare_megatron.__main__ import main
from stare_megatron.config import SftConfig, parse_sft
from stare_megatron.errors import UserError
from stare_megatron.plan import estimate, supervised
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.command import Options, run
from stare_megatron.plan.estimate import Given
from stare_megatron.plan.hardware import CONSTANTS, GPUS
from stare_megatron.plan.memory import Phase
from stare_megatron.plan.supervised import SupervisedPlan, batch_lengths
from stare_megatron.plan.timing import Machine
from stare_megatron.run.folder import to_toml
from tests.unit.plan.models import MODELS, config_of, shape_of

MACHINE = Machine(GPUS["h100"], CONSTANTS, Layers.ENGINE)
TRAINER = {
    "world_size": 16, "tensor_parallel": 4, "sequence_parallel": True, "micro_batch_tokens": 16384,
    "logits_chunk_tokens": 4096, "recompute": "selective", "recompute_modules": ["mlp"],
}  # fmt: skip


def config(name: str = "qwen2.5-7b", **tables: dict[str, Any]) -> SftConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(MODELS / name), "dtype": "bfloat16"},
        "data": {"train": ["talk.jsonl"]},
        "sft": {"batch_sequences": 64, "max_tokens": 16384},
        "trainer": TRAINER,
    }
    return parse_sft({key: base.get(key, {}) | tables.get(key, {}) for key in base | tables}, "test")


def plan_of(given: SftConfig, *, nodes: int = 0, prompt: float = 0.0, learned: float = 0.0) -> SupervisedPlan:
    lengths = batch_lengths(given, prompt, learned, None)
    return supervised.make(given, shape_of(given.model.path.name), Given(MACHINE, lengths, nodes=nodes))


def test_ranks_hold_and_take_what_they_would_in_a_run_with_engines() -> None:
    """Of the same batch, in its update."""
    one = plan_of(config())
    rollout = {"prompts_per_step": 64, "group_size": 1, "max_response_tokens": 14336, "dynamic_sampling": False}
    other = config_of(
        "qwen2.5-7b", model={"dtype": "bfloat16"}, trainer=TRAINER, data={"max_prompt_tokens": 2048},
        rollout=rollout | {"group_size": 2}, inference={"engines": 4, "placement": "separate"},
    )  # fmt: skip
    other = other.model_copy(update={"rollout": other.rollout.model_copy(update={"group_size": 1})})
    whole = estimate.make(other, shape_of("qwen2.5-7b"), one.given)
    (theirs,) = [use for use in whole.uses if use.phase is Phase.UPDATE]
    (mine,) = one.uses
    assert mine == theirs
    assert (one.update, one.save, one.host) == (whole.update, whole.save, whole.host)
    assert one.seconds == one.update.seconds


def test_offloaded_states_come_and_go_in_the_step() -> None:
    one = plan_of(config(trainer=TRAINER | {"offload": ["optimizer"]}))
    assert one.moved > 0
    assert one.seconds == one.update.seconds + one.moved
    assert "rank: optimizer" not in one.uses[0].parts or one.uses[0].total < plan_of(config()).uses[0].total


def test_every_violation_at_once_with_its_cure() -> None:
    wrong = TRAINER | {"world_size": 18, "tensor_parallel": 3, "recompute": "none", "recompute_modules": []}
    plan = plan_of(config(trainer=wrong, sft={"max_tokens": 200_000}), nodes=2)
    said = "\n".join(plan.violations)
    for part in (
        "trainer.tensor_parallel = 3 does not divide",
        "sft.max_tokens = 200000; the model's config.json allows at most ",
        "the run takes 18 GPUs, --nodes 2 of 8 are 16",
        "update: rank takes",
    ):
        assert part in said
    assert all(re.search("choose|lower|raise|set ", problem) for problem in plan.violations)
    assert "inference" not in said
    assert "rollout" not in said


def test_a_cure_of_memory_cures() -> None:
    trainer = TRAINER | {"recompute": "none", "recompute_modules": [], "micro_batch_tokens": 65536}
    (problem,) = plan_of(config(trainer=trainer, sft={"max_tokens": 4096})).violations
    change = dict(item.split("=") for item in re.findall(r"trainer\.([a-z_]+=\w+)", problem))
    assert change
    trainer |= {key: int(value) if value.isdigit() else value for key, value in change.items()}
    assert plan_of(config(trainer=trainer, sft={"max_tokens": 4096})).violations == ()


def test_batches_by_tokens() -> None:
    found = batch_lengths(config(sft={"batch_sequences": 32, "batch_tokens": 100_000}), 200.0, 800.0, None)
    assert len(found.responses) == 100
    assert sum(found.sequences) == pytest.approx(100_000, rel=0.01)
    assert max(found.sequences) <= 16384
    assert found.action_share == pytest.approx(0.8, abs=0.01)


def test_means_of_a_run(tmp_path: Path) -> None:
    row = {"step": 1, "sft/sequences": 8, "sft/tokens": 8000, "throughput/trained_tokens": 2000}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    found = batch_lengths(config(), 0.0, 0.0, tmp_path)
    assert (found.prompt, round(found.response)) == (750.0, 250)
    assert "mean 1,000 in the newest 1 steps, 25% learned" in found.source
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "response/length_mean": 0.5}\n')
    with pytest.raises(UserError, match="no sft/tokens"):
        batch_lengths(config(), 0.0, 0.0, tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sft.toml").write_text(to_toml(config()))
    return tmp_path / "sft.toml"


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--nodes", "2"]) == 0
    shown = capsys.readouterr().out
    for part in ("16 x h100", "64 sequences", "75% of them learned", "rank: optimizer", "update", "save", "fits:"):
        assert part in shown
    for part in ("engine", "rollout", "KV"):
        assert part not in shown
    assert main(["plan", str(file), "trainer.recompute=none", "trainer.recompute_modules=[]", "--gpu=a100",
                 "trainer.micro_batch_tokens=65536"]) == 1  # fmt: skip
    assert "does not fit  update: rank takes" in capsys.readouterr().out


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--json", "--response", "1000", "--prompt", "1000"]) == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (table["fits"], table["gpus"]) == (True, 16)
    assert table["tokens"] == pytest.approx(64 * 2000, rel=0.01)
    (use,) = table["memory"]
    assert use["total"] == pytest.approx(sum(use["parts"].values()))


@pytest.mark.parametrize("options", [{"search": True}, {"kept": 0.5}])
def test_what_is_of_engines_is_refused(file: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--search and --kept are of runs with engines"):
        run([str(file)], Options(**options), Console())
