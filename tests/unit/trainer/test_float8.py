"""`trainer.fp8`: what it needs, and what Megatron-Core is told. `tests/te` has what Transformer Engine makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stare_megatron.config import TrainerConfig, parse_sft
from stare_megatron.config.float8 import FORMATS
from stare_megatron.config.upstream import check_megatron
from stare_megatron.errors import UserError
from stare_megatron.metrics.advice import Settings
from stare_megatron.models.layout import check_fp8
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.memory import Phase, RankInput, largest_pack, rank_parts, residency
from stare_megatron.trainer import float8, model, spec
from tests.configs import FLOAT8, changed
from tests.unit.plan.models import config_of, given_for, shape_of

GOOD = FLOAT8 | {"trainer": {"fp8": "blockwise"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"dtype": "float16"}},
            'trainer.fp8 = "blockwise" is of 16-bit weights; set model.dtype = "bfloat16"$',
        ),
        ({"algorithm": {"correction": {}}}, 'set algorithm.correction.mode = "truncate" or "mask"'),
        ({"sync": {"probe_threshold": 0.0}}, "set sync.probe_threshold"),
        ({"trainer": {"fp8": "mxfp8", "scoring": "rollout"}}, 'set trainer.scoring = "trainer"'),
        ({"trainer": {"fp8": "delayed"}}, "blockwise"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        changed(GOOD, changes)


def test_supervised_training_needs_the_type_alone() -> None:
    tree = {"model": {"path": "m", "dtype": "bfloat16"}, "data": {"train": ["t"]}, "trainer": {"fp8": "tensorwise"}}
    assert parse_sft(tree, "test").trainer.fp8 == "tensorwise"
    with pytest.raises(UserError, match=r'set model\.dtype = "bfloat16"'):
        parse_sft(tree | {"model": {"path": "m", "dtype": "float32"}}, "test")


@pytest.mark.parametrize("key", ["fp8", "fp8_recipe"])
def test_upstreams_names_are_not_another_way(key: str) -> None:
    with pytest.raises(UserError, match=r"set trainer\.fp8 instead"):
        check_megatron({key: "e4m3"})


def refused(name: str, engine: bool | None = None, **trainer: Any) -> str:
    with pytest.raises(UserError) as error:
        check_fp8(TrainerConfig(**{"fp8": "blockwise"} | trainer), shape_of(name), engine)
    return str(error.value)


def test_what_the_model_must_be() -> None:
    assert "those here are torch's; leave it out" in refused("qwen2.5-7b", engine=False)
    assert "experts" in refused("qwen3-30b-a3b")
    two = {"world_size": 2, "tensor_parallel": 2}
    said = refused("qwen2.5-0.5b", **two)
    assert "queries, keys and values are 576 wide with trainer.tensor_parallel = 2" in said
    check_fp8(TrainerConfig(fp8="blockwise"), shape_of("qwen2.5-0.5b"), None)
    check_fp8(TrainerConfig(fp8="tensorwise", **two), shape_of("qwen2.5-0.5b"), True)
    for name in ("qwen2.5-7b", "qwen3-8b-base", "qwen3-32b"):
        check_fp8(TrainerConfig(fp8="blockwise", world_size=4, tensor_parallel=4), shape_of(name), True)


def config(monkeypatch: pytest.MonkeyPatch, **trainer: Any) -> model.PolicyConfig:
    """As on a GPU with Transformer Engine, which is not asked."""
    monkeypatch.setattr(spec, "providers", lambda: spec.Providers("transformer_engine", "torch", False))
    monkeypatch.setattr(spec, "fusion_settings", dict)
    monkeypatch.setattr(float8, "check_device", lambda _: None)
    return model.policy_config(shape_of("qwen2.5-7b"), torch.bfloat16, TrainerConfig(**trainer))


@pytest.mark.parametrize("recipe", FORMATS)
def test_megatron_core_is_told(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    got = config(monkeypatch, fp8=recipe)
    assert (got.fp8, got.fp8_recipe, got.fp8_param) == (FORMATS[recipe], recipe, False)
    assert config(monkeypatch).fp8 is None


def test_copies_in_float8_go() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    kept = {"weight": torch.ones(3)}
    module[1]._fp8_workspaces = kept
    float8.forget_copies([module])
    assert kept == {}


def test_the_plan_counts_them() -> None:
    shape: ModelShape = shape_of("qwen2.5-7b")

    def parts(phase: Phase, **trainer: Any) -> dict[str, float]:
        tables = GOOD | {"trainer": {"world_size": 4, "tensor_parallel": 4} | trainer}
        run = config_of("qwen2.5-7b", **tables)
        pack = largest_pack(run, given_for(run, "h100", Layers.ENGINE).lengths)
        return rank_parts(run, shape, RankInput(Layers.ENGINE, pack, 8, residency(run)), phase, 0)

    plain = parts(Phase.UPDATE)
    # But embedding and output layer; norms and biases are few.
    matrices = plain["weights"] / 2 - 2 * shape.vocab * shape.hidden / 4
    assert parts(Phase.UPDATE, fp8="blockwise")["float8 weights"] == pytest.approx(2 * matrices, rel=0.01)
    assert "float8 weights" not in plain
    assert "float8 weights" in parts(Phase.ROLLOUT, fp8="blockwise")
    assert "float8 weights" not in parts(Phase.ROLLOUT, fp8="blockwise", offload=["parameters"])


def test_the_advice_knows_of_it() -> None:
    assert Settings.of({"trainer.fp8": "blockwise"}).quantized
    assert not Settings.of({"trainer.fp8": "none"}).quantized
