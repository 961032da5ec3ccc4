"""`trainer.optimizer.precision_aware` and its types: what they need, said at the door."""

from __future__ import annotations

from typing import Any

import pytest

from stare_megatron.config import Config, TrainerConfig
from stare_megatron.config.upstream import check_precision_aware
from stare_megatron.errors import UserError
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from tests.configs import configuration, small_model

ON = {"precision_aware": True}


def made(optimizer: dict[str, Any], dtype: str = "bfloat16", **trainer: Any) -> Config:
    return configuration(model={"dtype": dtype}, trainer={"optimizer": optimizer} | trainer)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "trainer", "words"),
    [
        ({"exp_avg_dtype": "bfloat16"}, "bfloat16", {}, 'exp_avg_dtype = "bfloat16" is for precision_aware = true'),
        ({"main_grads_dtype": "bfloat16"}, "bfloat16", {}, 'main_grads_dtype = "bfloat16" is for precision_aware'),
        (ON, "bfloat16", {"distributed_optimizer": False}, "needs distributed_optimizer = true"),
        (ON, "float32", {}, "is for master weights"),
        (ON | {"main_grads_dtype": "bfloat16"}, "float16", {}, 'needs model.dtype = "bfloat16", it is "float16"'),
        (ON | {"exp_avg_dtype": "float8"}, "bfloat16", {}, "float8"),
    ],
)
def test_what_cannot_be_is_refused(optimizer, dtype, trainer, words) -> None:
    with pytest.raises((UserError, ValueError), match=words):
        made(optimizer, dtype, **trainer)


def test_what_can_be_is_taken() -> None:
    types = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "main_grads_dtype": "bfloat16"}
    assert made(ON | types).trainer.optimizer.types == types
    assert made(ON | {"exp_avg_dtype": "float16"}, "float16").trainer.optimizer.precision_aware


def test_it_needs_transformer_engines_adam() -> None:
    trainer = TrainerConfig.model_validate({"optimizer": ON})
    check_precision_aware(trainer, None)
    check_precision_aware(trainer, True)
    check_precision_aware(TrainerConfig(), False)
    with pytest.raises(UserError, match="needs Transformer Engine's Adam"):
        check_precision_aware(trainer, False)


def test_a_run_on_cpus_is_refused_before_it_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    path = small_model(tmp_path / "model")
    config = configuration(model={"path": str(path), "dtype": "bfloat16"}, trainer={"optimizer": ON})
    with pytest.raises(UserError, match="install transformer-engine on a machine with GPUs"):
        preflight.check_trainer_options(config, read_hf_config(path))
