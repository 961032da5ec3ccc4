"""The plan's lines at a run's start, and plan against measurement at its end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stare_megatron.host import device
from stare_megatron.plan import hardware
from stare_megatron.run import forecast as module
from stare_megatron.run.forecast import allocated, compared, forecast, peak_flops
from stare_megatron.run.machine import cpu_memory_bytes
from tests.configs import configuration, small_model
from tests.unit.plan.models import config_of, shape_of

H100 = device.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, "GPU-0")
TABLES = {
    "rollout": {"prompts_per_step": 8, "group_size": 8, "max_response_tokens": 2000},
    "data": {"max_prompt_tokens": 512},
}


def write(folder: Path, **values: float) -> Path:
    rows = [{"step": step} | {name.replace("__", "/"): value for name, value in values.items()} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_cpu_has_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: False)
    config = configuration(model={"path": str(small_model(tmp_path / "model"))})
    found = forecast(config)
    assert found.plan is None
    ((label, text),) = found.lines()
    assert label == "plan"
    assert text.startswith("about ")
    need = cpu_memory_bytes(config, module.read_hf_config(config.model.path)) / 2**30
    ((_, said),) = found.against(write(tmp_path, memory__host_run=need * 1024 / 2))
    assert said == f"memory {need:,.1f} GiB planned, {need / 2:,.1f} measured (+100%)"
    assert found.against(write(tmp_path, reward__mean=1.0)) == []


def test_gpus_have_times_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    found = forecast(config_of("qwen2.5-1.5b", **TABLES))
    assert found.plan is not None
    assert found.lines()[0][1].startswith(f"{found.plan.seconds:,.1f} s a step (rollout ")
    said = found.against(write(tmp_path, time__update=10.0, response__length_mean=900.0, response__length_max=2000.0))
    assert [label for label, _ in said] == ["plan", "", "", "", ""]
    assert "update" in said[2][1]
    assert "10.0 measured" in said[2][1]
    # Shorter responses than those assumed: the plan is made again with them.
    assert f"{found.plan.update.seconds:,.1f} s planned" not in said[2][1]


def test_memory_is_planned_for_the_largest_micro_batch_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    found = forecast(config_of("qwen2.5-1.5b", trainer={"micro_batch_tokens": 16384}, **TABLES))
    assert found.plan is not None

    def planned(**values: float) -> float:
        lengths = {"response__length_mean": 900.0, "response__length_max": 2000.0}
        (_, said) = found.against(write(tmp_path, **lengths, **values))[-1]
        return float(said.split()[2])

    most = planned()
    assert planned(packing__largest_tokens=16384.0) == most
    half = planned(packing__largest_tokens=8192.0)
    states = sum(found.plan.uses[0].parts[f"rank: {name}"] for name in ("weights", "gradients", "optimizer")) / 2**30
    assert half - states == pytest.approx((most - states) / 2, rel=0.1)


def test_saves_are_compared_as_far_as_the_loop_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    found = forecast(config_of("qwen2.5-1.5b", **TABLES))
    assert found.plan is not None
    said = [text for _, text in found.against(write(tmp_path, time__update=10.0, time__save=4.0))]
    assert f"save, waited for {compared(found.plan.save.seconds, 4.0, 's')}" in said


def test_measured_constants_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    file = tmp_path / "gpu.json"
    hardware.write_constants(file, {"gemm": 0.35})
    slow = forecast(config_of("qwen2.5-1.5b", logging={"plan_constants": str(file)}, **TABLES)).plan
    plain = forecast(config_of("qwen2.5-1.5b", **TABLES)).plan
    assert slow is not None
    assert plain is not None
    assert slow.update.parts.products == pytest.approx(2 * plain.update.parts.products)
    assert slow.update.parts.memory == plain.update.parts.memory


def test_what_torch_allocates_is_compared_with_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    plan = forecast(config_of("qwen2.5-1.5b", **TABLES)).plan
    assert plan is not None
    held = sum(n for n in (use.total for use in plan.uses if use.phase.value == "update"))
    assert 18 * shape_of("qwen2.5-1.5b").layers * 45e6 < allocated(plan) < held


@pytest.mark.parametrize("gpus", [(), (device.Gpu("NVIDIA T4", 2**34, "GPU-0"),)])
def test_nothing_is_said_of_gpus_that_are_not_known(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[device.Gpu, ...]
) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: None)
    monkeypatch.setattr(device, "gpus", lambda: gpus)
    assert forecast(config_of("qwen2.5-1.5b", **TABLES)).lines() == []


def test_how_far_it_is_off() -> None:
    assert compared(12.0, 10.0, "s") == "12.0 s planned, 10.0 measured (+20%)"
    assert compared(12.0, 0.0, "s") == "12.0 s planned, 0.0 measured"


def test_the_speed_of_a_gpu_is_that_of_its_kind_and_of_no_other_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "on_gpus", lambda _: True)
    monkeypatch.setattr(device, "gpus", lambda: (H100,))
    assert peak_flops(config_of("qwen2.5-1.5b", model={"dtype": "bfloat16"})) == 989e12
    assert math.isnan(peak_flops(config_of("qwen2.5-1.5b", model={"dtype": "float32"})))
    monkeypatch.setattr(device, "gpus", lambda: (device.Gpu("NVIDIA T4", 2**34, "GPU-0"),))
    assert math.isnan(peak_flops(config_of("qwen2.5-1.5b", model={"dtype": "bfloat16"})))
    monkeypatch.setattr(module, "on_gpus", lambda _: False)
    assert math.isnan(peak_flops(config_of("qwen2.5-1.5b", model={"dtype": "bfloat16"})))
