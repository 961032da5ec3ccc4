"""Every TOML file of the examples is let in, but for weights and data, and planned: runs, studies, supervised runs."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.config import Config
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan import supervised
from stare_megatron.plan.command import Options, given_of, machine_of
from stare_megatron.plan.estimate import Given, make
from stare_megatron.run import machine, preflight
from stare_megatron.sft import check
from stare_megatron.study import spec
from tests.contracts.source import ROOT
from tests.unit.examples.recipes import MODELS, RECIPES

EXAMPLES = ROOT / "examples"
# What the examples' commands make: layers, width, heads, KV heads, MLP, vocabulary.
MADE = {
    ".cache/demo": (2, 64, 2, 2, 192, 112),
    ".cache/entropy_band": (2, 64, 2, 2, 192, 112),
    ".cache/number_walk": (2, 64, 2, 2, 192, 112),
    ".cache/tool_use": (2, 64, 2, 2, 192, 112),
    ".cache/scaling_cpu/30k": (2, 32, 1, 1, 96, 112),
    ".cache/scaling_cpu/114k": (2, 64, 2, 2, 192, 112),
    ".cache/scaling_cpu/490k": (4, 96, 3, 3, 288, 112),
    ".cache/scaling_cpu/1.9M": (4, 192, 6, 6, 576, 112),
    ".cache/gsm8k_cpu": (3, 128, 4, 2, 256, 258),
    ".cache/smollm2": (30, 768, 12, 4, 1536, 49152),  # padded, as `make smollm2` does
}
EXPORTED = {"runs/gsm8k_cpu-sft": ".cache/gsm8k_cpu"}
PUBLISHED = {f"models/{name}": name.lower() for name in ("Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B")}
FILES = sorted(f for f in EXAMPLES.glob("*/*.toml") if f.parent.name != "base")
STUDIES = [f for f in FILES if "variants" in tomllib.loads(f.read_text())]
SUPERVISED = [f for f in FILES if f.name == "sft.toml"]
RUNS = [f for f in FILES if f not in (*STUDIES, *SUPERVISED)]


def shape_folder(model: Path, folder: Path, file: Path) -> Path:
    """A folder with the config.json of the model that an example names."""
    named = str(model.relative_to(Path.cwd()))
    for recipe in RECIPES:
        if recipe.path.parent == file.parent:
            names = {recipe.path: recipe.model, file.parent / "grpo.toml": recipe.model}
            if file in names or file.name == "sft.toml":
                return MODELS / recipe.model
    if named in PUBLISHED:
        return MODELS / PUBLISHED[named]
    named = next((made for out, made in EXPORTED.items() if named.startswith(out)), named)
    (made,) = (sizes for prefix, sizes in MADE.items() if named.startswith(prefix))
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = dict(zip((*keys, "vocab_size"), made, strict=True))
    shape |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 1e-6, "rope_theta": 1e4}))
    return folder


def let_in_and_planned(made: Config, folder: Path, file: Path) -> None:
    path = shape_folder(made.model.path, folder, file)
    made = made.model_copy(update={"model": made.model.model_copy(update={"path": path})})
    shape = read_hf_config(path)
    preflight.check_trainer_options(made, shape)
    preflight.check_layout(made, shape)
    preflight.check_window(made, shape)
    preflight.check_engine_options(made, shape)
    preflight.check_method(made)
    machine.check_machine(made, shape)
    assert make(made, shape, given_of(made, Options())).violations == ()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where paths of the examples begin."""
    monkeypatch.chdir(ROOT)


def test_every_file_is_of_one_of_these() -> None:
    assert len(RUNS) > 25
    assert len(STUDIES) == 14
    assert {f.parent.name for f in SUPERVISED} == {"gsm8k_cpu", "tool_use_7b", "tool_use_cpu"}


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_run(file: Path, tmp_path: Path) -> None:
    # What an example for GPUs takes of this machine is not asked.
    elsewhere = ["cluster.address=auto"] if file.parent in {recipe.path.parent for recipe in RECIPES} else []
    let_in_and_planned(config.load(file, elsewhere), tmp_path, file)


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_the_runs_of_a_study(file: Path, tmp_path: Path) -> None:
    """Every variant, of one seed."""
    jobs = {job.variant: job for job in spec.load(file, "").jobs}
    for job in jobs.values():
        let_in_and_planned(job.config, tmp_path, file)
    for form in spec._read(file).forms:
        assert spec.load(file, form).jobs


@pytest.mark.parametrize("file", SUPERVISED, ids=lambda f: f.parent.name)
def test_a_supervised_run(file: Path, tmp_path: Path) -> None:
    made = config.load_sft(file, [])
    path = shape_folder(made.model.path, tmp_path, file)
    made = made.model_copy(update={"model": made.model.model_copy(update={"path": path})})
    ranks, shape = made.for_ranks(), read_hf_config(path)
    preflight.check_trainer_options(ranks, shape)
    preflight.check_layout(ranks, shape)
    check.check_window(made, shape)
    machine.check_machine(ranks, shape)
    options = Options()
    lengths = supervised.batch_lengths(made, options.prompt, options.response, options.run)
    plan = supervised.make(made, shape, Given(machine_of(options), lengths, nodes=options.nodes))
    assert plan.violations == ()
