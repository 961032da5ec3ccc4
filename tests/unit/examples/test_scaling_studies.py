"""The studies of sizes: every run of them is planned, and sizes differ in nothing but what their pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.config import flatten
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.command import Options, given_of
from stare_megatron.plan.estimate import make
from stare_megatron.study import spec
from stare_megatron.study.spec import Job
from tests.contracts.source import ROOT
from tests.unit.examples.recipes import MODELS

QWEN = ROOT / "examples/scaling_qwen2_5/study.toml"
CPU = ROOT / "examples/scaling_cpu/study.toml"
# What a size is, and what it runs on.
OF_A_SIZE = {
    "model.path",
    "trainer.world_size",
    "trainer.tensor_parallel",
    "inference.engines",
    "inference.tensor_parallel",
}
OF_A_RUN = {"run.name", "run.seed", "algorithm.method"}


def unlike(jobs: list[Job]) -> set[str]:
    """Keys on which runs do not agree."""
    told = [flatten(job.config.model_dump(mode="json")) for job in jobs]
    return {key for key in told[0] if len({str(one[key]) for one in told}) > 1}


@pytest.mark.parametrize("size", ["7b", "14b", "32b"])
def test_every_size_of_qwen_fits_its_gpus_and_its_page_says_so(size: str) -> None:
    (job,) = [job for job in spec.load(QWEN, "one_seed").jobs if job.variant == f"stare_{size}"]
    made = config.load(QWEN.parent / "../short_cot_7b/run.toml", [*job.settings, f"model.path={MODELS}/qwen2.5-{size}"])
    plan = make(made, read_hf_config(made.model.path), given_of(made, Options()))
    assert plan.violations == ()
    gib = max(use.total for use in plan.uses) / 2**30
    page = (QWEN.parent / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {size.upper()} |"))
    assert row.startswith(f"| {size.upper()} | {plan.gpus} | TP {made.trainer.tensor_parallel}, ")
    assert row.endswith(f"| {gib:.0f} | {plan.seconds:.0f} |")


def test_sizes_of_qwen_differ_in_model_and_layout_alone() -> None:
    jobs = list(spec.load(QWEN, "").jobs)
    assert len(jobs) == 18
    assert unlike(jobs) == OF_A_SIZE | OF_A_RUN


def test_sizes_on_the_cpu_differ_in_model_and_learning_rate_alone() -> None:
    jobs = list(spec.load(CPU, "").jobs)
    assert len(jobs) == 16
    files = {"model.path", "data.train", "eval.benchmarks"}
    assert unlike(jobs) == files | OF_A_RUN | {"trainer.optimizer.lr"}
    for job in jobs:
        width = {"30k": 32, "114k": 64, "490k": 96, "1.9M": 192}[job.variant.rpartition("_")[2]]
        assert job.config.trainer.optimizer.lr == pytest.approx(1e-3 * 64 / width, rel=0.02)
        assert Path(job.config.model.path).parts[-2].endswith(f"-{job.seed}")


def test_a_size_on_the_cpu_is_made_once_for_both_methods() -> None:
    study = spec.load(CPU, "")
    assert [len(commands) for commands in study.prepare.values()] == [4, 4]
    alone = spec.load(CPU, "", ["*_30k-seed1"])
    assert [len(commands) for commands in alone.prepare.values()] == [1]
