"""The settings of gpu_check's short runs are ones that the commands take, on a GPU and on a CPU; nothing is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.config import parse
from stare_megatron.config.sft import SftConfig
from tools.gpu_check_parts import loop, models, rank, variants
from tools.gpu_check_parts.one_rank import configuration
from tools.gpu_check_parts.outcome import Context, Outcome, Status

Part = Callable[[Context], Outcome]
PARTS: list[Part] = [
    variants.reference,
    variants.stream,
    variants.recovery,
    variants.drafts,
    variants.quantized,
    variants.trained_in_float8,
    variants.replay,
    variants.supervised,
]
NEEDS_A_GPU = (variants.replay, variants.recovery, variants.trained_in_float8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_settings_are_taken(part: Part, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def command(name: str, folder: Path, tables: dict[str, Any], meanwhile: object = None) -> int:
        SftConfig.model_validate(tables) if name == "sft" else parse(tables, name)
        read.append(name)
        return 1

    monkeypatch.setattr(loop, "command", command)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: ModuleSpec("transformer_engine", None))
    monkeypatch.setattr(models, "make", lambda *_, **__: 1)
    outcome = part(Context(device, tmp_path, tmp_path, 60))
    if part in NEEDS_A_GPU and device == "cpu":
        assert outcome.status is Status.SKIPPED
        return
    assert len(read) == 1
    assert outcome.status is Status.FAILED
    assert "ended with code 1" in outcome.reason


def test_a_metric_that_is_missing_or_too_small_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": 1, "sync/probe": 0.0, "sync/weight_version": 1, "kl/reference": 0.5, "time/step": 1.0}]
    monkeypatch.setattr(loop, "command", lambda *_: 0)
    monkeypatch.setattr(models, "make", lambda *_, **__: 1)
    monkeypatch.setattr(loop, "recorded", lambda *_: rows)
    context = Context("cpu", tmp_path, tmp_path, 60)

    def found(**finds: float) -> Outcome:
        named = {name.replace("_", "/"): least for name, least in finds.items()}
        return loop.of_model(context, models.TINY, {}, (1,), finds=named)

    assert found(kl_reference=0.5).status is Status.OK
    assert "kl/reference of the steps is [0.5], wanted 0.6" in found(kl_reference=0.6).reason
    assert "engine/acceptance of the steps is [nan]" in found(engine_acceptance=0.0).reason


def test_the_optimizer_in_fewer_bytes_is_taken(tmp_path: Path) -> None:
    made = configuration(tmp_path, "bfloat16", rank._FEWER_BYTES)
    assert made.trainer.optimizer.exp_avg_sq_dtype == "bfloat16"
    assert rank.precision_aware(Context("cpu", tmp_path, tmp_path, 60)).status is Status.SKIPPED
