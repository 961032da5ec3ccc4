"""The product of the main switches: every combination is refused at the door by its keys, or can be built.

Pairs are covered, not all combinations: `test_every_pair_is_tried` counts them.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import config
from stare_megatron.config import Config, parse
from stare_megatron.config.methods import METHODS
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.run import machine, preflight
from tests.configs import small_model
from tests.contracts.source import ROOT
from tests.unit.config import probes
from tests.unit.config.test_config_properties import with_value
from tests.unit.examples.recipes import RECIPES

GPUS = {"cpu": 0, "gpu": 1, "gpus": 8}
# Switch -> its values, the usual one first. `machine` is no key; DENSE and MOE stand for checkpoints.
SWITCHES: dict[str, list[Any]] = {
    "machine": list(GPUS),
    "model.path": ["DENSE", "MOE"],
    "model.dtype": ["bfloat16", "float32", "float16"],
    "inference.placement": ["colocated", "separate"],
    "inference.engines": [1, 2],
    "inference.tensor_parallel": [1, 2],
    "trainer.world_size": [4, 8, 1],
    "trainer.tensor_parallel": [1, 2],
    "trainer.pipeline_parallel": [1, 2],
    "trainer.virtual_pipeline": [1, 2],
    "trainer.context_parallel": [1, 2],
    "trainer.expert_parallel": [1, 2],
    "trainer.sequence_parallel": [False, True],
    "trainer.distributed_optimizer": [True, False],
    "trainer.recompute": ["none", "selective", "full"],
    "trainer.updates_per_batch": [1, 2],
    "trainer.scoring": ["trainer", "rollout"],
    "trainer.logits_chunk_tokens": [0, 16],
    "trainer.optimizer.schedule": ["constant", "cosine", "linear"],
    "trainer.optimizer.warmup_steps": [0, 2, 9],
    "algorithm.method": ["stare", *sorted(METHODS.keys() - {"stare"})],
    "algorithm.correction.mode": ["none", "truncate", "mask"],
    "rollout.dynamic_sampling": [True, False],
    "rollout.max_refills": [10, 0],
    "rollout.temperature": [1.0, 0.7],
    "rollout.overlong": ["train", "mask"],
    "env.name": ["single_turn", "tool_use"],
    "env.parser": ["", "hermes", "retool", "fenced"],
    "env.parallel_calls": [None, True],
    "sync.probe_every": [1, 0],
    "eval.benchmarks": [[], ["BENCH"]],
    "eval.every": [0, 2],
    "checkpoint.every": [1, 2],
    "checkpoint.asynchronous": [True, False],
    "checkpoint.export_every": [0, 2],
    "checkpoint.export_final": [True, False],
}
REQUIRED: dict[str, Any] = {"run.steps": 6, "data.train": ["TRAIN"], "reward.name": "exact"}
SMALL = {
    "data.max_prompt_tokens": 8, "rollout.max_response_tokens": 24, "rollout.prompts_per_step": 8,
    "rollout.group_size": 4, "run.dir": "RUNS",
}  # fmt: skip
Choice = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("switches")
    return {
        "DENSE": str(small_model(folder / "dense")),
        "MOE": str(small_model(folder / "moe", experts=4)),
        "TRAIN": str(probes.rows(folder / "train.jsonl")),
        "BENCH": str(probes.rows(folder / "bench.jsonl", first=30)),
        "RUNS": str(folder / "runs"),
    }


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of enough memory, whatever the one the tests run on."""
    memory = machine.psutil.virtual_memory()._replace(total=2**40, available=2**40)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)


def on(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(device, "gpu_names", lambda: ("NVIDIA H100",) * gpus)
    monkeypatch.setenv("STARE_DEVICE", "" if gpus else "cpu")


def filled(value: Any, files: dict[str, str]) -> Any:
    return [filled(v, files) for v in value] if isinstance(value, list) else files.get(str(value), value)


def read(keys: Choice, files: dict[str, str]) -> Config:
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        if key != "machine" and value not in (None, ""):
            tree = with_value(tree, key, filled(value, files))
    return parse(tree, "x.toml")


def choices() -> list[Choice]:
    """Few changes of the usual values each, until every pair of values has been together."""
    rng, made = random.Random(0), []
    values = [(key, value) for key, all_values in SWITCHES.items() for value in all_values[1:]]
    pairs = [(a, b) for a, b in itertools.combinations(values, 2) if a[0] != b[0]]
    rng.shuffle(pairs)
    waiting = {repr(pair) for pair in pairs}
    for pair in pairs:
        if repr(pair) in waiting:
            changes = dict(pair) | dict(rng.sample(values, 3))
            changes |= dict(pair)
            made.append({key: changes.get(key, usual[0]) for key, usual in SWITCHES.items()})
            here = [(key, value) for key, value in values if repr(made[-1][key]) == repr(value)]
            waiting -= {repr(p) for p in itertools.combinations(here, 2)}
    return made


CHOICES = choices()


def test_every_pair_is_tried() -> None:
    seen = {
        (a, repr(choice[a]), b, repr(choice[b])) for choice in CHOICES for a, b in itertools.combinations(SWITCHES, 2)
    }
    pairs = [
        (a, repr(x), b, repr(y))
        for a, b in itertools.combinations(SWITCHES, 2)
        for x in SWITCHES[a]
        for y in SWITCHES[b]
    ]
    assert [pair for pair in pairs if pair not in seen] == []


LEAVES = {key.rpartition(".")[2] for key in [*SWITCHES, *REQUIRED, *SMALL, "inference.max_model_len", "top_p"]}


def named(message: str) -> set[str]:
    """Keys and machines that a refusal is about."""
    words = set(re.findall(r"\w+", message.partition(": ")[2] if message.startswith("x.toml") else message))
    about = {"machine", "CPUs"} & words | ({"model.path"} if "model" in words else set())
    return words & LEAVES | about | ({"name"} if '"single_turn"' in message else set())


def outcome(make: Callable[[], Config]) -> Config | None:
    """What `make` returns, if it passes the door; None if it is refused, by both keys."""
    try:
        made = make()
        preflight.check(made)
    except UserError as e:
        said = str(e)
    else:
        return made
    assert len(named(said)) > 1, said
    assert "\n" not in said
    return None


def test_a_combination_is_refused_by_its_keys_or_can_be_built(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[Choice] = []
    for choice in CHOICES:
        gpus = GPUS[choice["machine"]]
        on(monkeypatch, gpus)
        made = outcome(functools.partial(read, REQUIRED | SMALL | choice, files))
        if made is None:
            continue
        accepted.append(choice)
        if len(accepted) % 4 == 0:  # a quarter, for the time it takes
            on(monkeypatch, 0)
            for probe in (probes.engine, probes.megatron, probes.adam, probes.rates, probes.plan, probes.sampled):
                probe(made)
            probes.objective(made)
            probes.questions(made)
    assert len(accepted) > len(CHOICES) // 5
    for key, values in SWITCHES.items():
        lonely = [v for v in values if not any(choice[key] == v for choice in accepted)]
        assert not lonely, f"{key} = {lonely} was never accepted"


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpoint", ["DENSE", "MOE"])
def test_the_defaults_can_be_used_together(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, checkpoint: str
) -> None:
    on(monkeypatch, GPUS[kind])
    made = read(REQUIRED | {"model.path": checkpoint, "model.dtype": dtype}, files)
    assert preflight.check(made) == ()


# Those for GPUs, whose layouts are for the shapes of their models, are in tests/unit/examples.
SMALL_EXAMPLES = sorted({*ROOT.glob("examples/*/run.toml")} - {recipe.path for recipe in RECIPES})


@pytest.mark.parametrize("example", SMALL_EXAMPLES, ids=lambda p: p.parent.name)
def test_examples_pass_the_door(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, example: Path) -> None:
    monkeypatch.chdir(ROOT)
    on(monkeypatch, 0)
    own = [f'model.path="{files["DENSE"]}"', f'data.train=["{files["TRAIN"]}"]']
    benchmarks = config.load(example, own).eval.benchmarks
    own += [f"eval.benchmarks={json.dumps([files['BENCH']])}"] if benchmarks else []
    assert preflight.check(config.load(example, own)) == ()
