"""Every example for GPUs: read, let in (but for weights and data), planned, launched dry; its page says the same."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml

from stare_megatron.__main__ import main
from stare_megatron.config import Config
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.command import Options, given_of
from stare_megatron.plan.estimate import Plan, make
from stare_megatron.run import machine, preflight
from tests.contracts.source import ROOT
from tests.shellcheck import complaints
from tests.unit.examples.recipes import MODELS, RECIPES, Recipe
from tests.unit.launch.kuberay import ConfigMap, RayJob

each = pytest.mark.parametrize("recipe", RECIPES, ids=str)
FOLDERS = sorted({recipe.path.parent for recipe in RECIPES})


@functools.cache
def planned(recipe: Recipe) -> Plan:
    made = recipe.load()
    return make(made, read_hf_config(made.model.path), given_of(made, Options()))


def told(made: Config) -> dict[str, object]:
    """A configuration without what a baseline may change."""
    tables = made.model_dump(mode="json")
    return tables | {
        "run": tables["run"] | {"name": ""},
        "algorithm": tables["algorithm"] | {"method": "", "stare": {}},
    }


def test_every_example_for_gpus_is_here() -> None:
    files = {
        str(f.relative_to(ROOT / "examples")) for folder in FOLDERS for f in folder.glob("*.toml") if f.stem != "sft"
    }
    assert files == {recipe.file for recipe in RECIPES} | {f"{folder.name}/grpo.toml" for folder in FOLDERS}
    including = [f for f in (ROOT / "examples").glob("*/*.toml") if "../base/" in f.read_text()]
    assert {file.parent for file in including} <= set(FOLDERS)


@each
def test_the_door_lets_it_in(recipe: Recipe) -> None:
    """But for weights, data and this machine."""
    made = recipe.load("cluster.address=auto")
    shape = read_hf_config(made.model.path)
    preflight.check_trainer_options(made, shape)
    preflight.check_layout(made, shape)
    preflight.check_window(made, shape)
    preflight.check_engine_options(made, shape)
    assert preflight.check_method(made) == ()
    assert machine.check_machine(made, shape) == ()


@each
def test_it_fits_its_gpus(recipe: Recipe) -> None:
    plan = planned(recipe)
    assert plan.violations == ()
    assert plan.gpus == recipe.gpus
    assert plan.tightest().free > 2 * 2**30


@each
def test_its_readme_has_what_the_plan_says(recipe: Recipe) -> None:
    """GPUs, the most of one that is taken, seconds of a step."""
    plan, page = planned(recipe), (recipe.path.parent / "README.md").read_text()
    gib = max(use.total for use in plan.uses) / 2**30
    row = rf"\| `{re.escape(recipe.path.name)}` \|.*\| {recipe.gpus} \| {gib:.0f} \| {plan.seconds:,.0f} \|"
    assert re.search(row, page), f"want a row with {recipe.gpus} GPUs, {gib:.0f} GiB, {plan.seconds:,.0f} s"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_baseline_is_the_same_run_without_the_weights(folder: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.path == folder / "run.toml")
    made, base = recipe.load(), Recipe(f"{folder.name}/grpo.toml", recipe.model, recipe.gpus).load()
    assert (made.algorithm.method, base.algorithm.method) == ("stare", "grpo")
    assert base.rollout.dynamic_sampling
    assert base.run.name == f"{made.run.name}-grpo"
    assert told(base) == told(made)


@each
def test_its_job_is_rendered(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For Slurm as a script that shellcheck takes, for KubeRay in its shape, on this machine as a command."""
    words = [str(recipe.path), f"model.path={MODELS / recipe.model}", "run.dir=/shared/runs"]
    local = recipe.load().cluster.address == "local"
    assert main(["launch", "slurm", *words, "--dry-run"]) == 0
    script = tmp_path / "job.sbatch"
    script.write_text(capsys.readouterr().out)
    assert complaints(script) == ""
    nodes = -(-recipe.gpus // 8)
    assert f"#SBATCH --nodes={nodes}\n" in script.read_text()
    assert f"#SBATCH --gpus-per-node={min(recipe.gpus, 8)}\n" in script.read_text()
    assert main(["launch", "k8s", *words, "--image=i", "--claim=shared:/", "--dry-run"]) == 0
    settings, job = yaml.safe_load_all(capsys.readouterr().out)
    ConfigMap.model_validate(settings)
    workers = RayJob.model_validate(job).spec.rayClusterSpec.workerGroupSpecs
    assert sum(group.replicas for group in workers if group.groupName == "main") == nodes - 1
    if local:
        assert main(["launch", "local", *words, "--dry-run"]) == 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_sizes_differ_in_a_dozen_lines_and_pages_say_what_was_tried(folder: Path) -> None:
    if folder.name != "tool_use_7b":  # which has an environment and a sandbox of its own
        for file in folder.glob("*.toml"):
            lines = [
                line for line in file.read_text().splitlines() if line and not line.startswith(("#", "[", "include"))
            ]
            assert len(lines) <= (12 if folder.name != "single_gpu_gsm8k" else 24), file
    page = (folder / "README.md").read_text().lower()
    for part in ("not tried", "paper", "launch"):
        assert part in page, part
