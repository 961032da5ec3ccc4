"""`inference.quantization`: what it needs, said at the door."""

from __future__ import annotations

from typing import Any

import pytest

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.inference.engine import Engine
from stare_megatron.metrics.advice import Settings
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from tests.configs import FLOAT8, changed, configuration, small_model

KIND = "fp8_per_channel"
GOOD = FLOAT8 | {"inference": {"quantization": KIND}}


def made(**changes: dict[str, Any]) -> Config:
    return changed(GOOD, changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"dtype": "float32"}}, 'set model.dtype = "bfloat16"'),
        ({"algorithm": {"correction": {}}}, 'set algorithm.correction.mode = "truncate" or "mask"'),
        ({"sync": {"probe_threshold": 0.0}}, "set sync.probe_threshold"),
        ({"sync": {"probe_every": 0}}, "sync.probe_every of at least 1"),
        ({"trainer": {"scoring": "rollout"}}, 'set trainer.scoring = "trainer"'),
        ({"inference": {"quantization": "fp4"}}, "fp4"),
    ],
)
def test_what_cannot_be_is_refused(changes, words) -> None:
    with pytest.raises(UserError, match=words):
        made(**changes)


def test_engines_are_told() -> None:
    for config, told in ((made(), KIND), (configuration(), None)):
        engine = Engine("e", config.model.path, config.model.dtype, config.inference, 64, 0, "gloo")
        assert engine._args.get("quantization") == told


def test_experts_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    path = small_model(tmp_path / "moe", experts=4)
    with pytest.raises(UserError, match="leave it out for a mixture of experts"):
        preflight.check_engine_options(made(model={"path": str(path)}), read_hf_config(path))


def test_the_advice_knows_of_it() -> None:
    assert Settings.of({"inference.quantization": KIND}).quantized
    assert not Settings.of({"inference.quantization": "none"}).quantized
