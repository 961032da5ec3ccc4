"""tools/gpu_check.py on a CPU: the same parts, the same report, the real command for the loop."""

from __future__ import annotations

import json
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stare_megatron.models.families import read_hf_config
from tests import programs
from tools.gpu_check_parts import models, report, transport
from tools.gpu_check_parts.outcome import Context

ROOT = Path(__file__).parents[2]
CHECK = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--minutes", "30"]


def check(out: Path, *parts: str) -> dict[str, dict]:
    """Parts by name, as the report has them; those of a GPU say that they need one."""
    command = [*CHECK, "--parts", ",".join(parts), "--out", str(out)]
    done = programs.run(command, cwd=ROOT)
    text = (out / report.TEXT).read_text()
    assert done.returncode == 0, text
    found = json.loads((out / report.JSON).read_text())
    assert found["machine"]["device"] == "cpu"
    assert not (out / "shared").exists()
    return {part["part"]: part for part in found["parts"]}


def test_cheap_parts(tmp_path: Path) -> None:
    found = check(tmp_path, "environment", "te-linear", "kernels")
    assert [p["status"] for p in found.values()] == ["ok", "skipped", "ok"]
    assert found["te-linear"]["reason"] == "needs a GPU"
    kernels = found["kernels"]["numbers"]
    assert kernels["path"] == "Triton"
    assert all(0 <= kernels[f"{dtype} gradient, error"] < 2e-6 for dtype in ("bfloat16", "float16", "float32"))


def mute(pipe: Connection, kind: str, place: str) -> None:
    """A receiver that hears the first call and never answers."""
    pipe.recv()
    time.sleep(600)


@pytest.mark.slow
def test_a_receiver_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "receive", mute)
    monkeypatch.setattr(transport, "_ANSWER_S", 2.0)
    with pytest.raises(RuntimeError, match="did not answer init_weight_transfer_engine within 2 s"):
        transport.check(Context("cpu", tmp_path, tmp_path, 120))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_and_a_push(tmp_path: Path) -> None:
    found = check(tmp_path, "rank", "offload", "transport", "sharded")
    assert [p["status"] for p in found.values()] == ["ok", "ok", "ok", "ok"]
    moved = found["offload"]["numbers"]
    assert moved["repeats itself"]
    assert moved["arena, GiB"] >= moved["moved, GiB"] > 0 == moved["left while engines sample, MiB"]
    numbers = found["rank"]["numbers"]
    for dtype in ("bfloat16", "float16"):  # rounding is seen: they were not computed in float32
        assert numbers[f"{dtype} log-probs after the updates, mean"] > 1e-5
    assert found["transport"]["numbers"]["transport"] == "gloo"
    for receiver in ("a receiver", "vLLM's worker"):
        assert found["sharded"]["numbers"][receiver]["carrier"] == "MAPPED"
    assert "ended" in found["sharded"]["numbers"]["a receiver that ends in a push"]["said"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_loop(tmp_path: Path) -> None:
    found = check(tmp_path, "loop", "loop-sharded")
    assert found["loop-sharded"]["numbers"]["median of later steps"]["throughput/pushed"] > 0
    numbers = found["loop"]["numbers"]
    assert len(numbers["step times"]) == 6
    assert numbers["median of later steps"]["time/update"] > 0
    assert not list((tmp_path / "parts").rglob("*.safetensors"))


def test_a_random_mixture_of_experts_is_one_that_ranks_take(tmp_path: Path) -> None:
    parameters = models.make(models.TINY_EXPERTS, tmp_path / "m", on="cpu", dtype=torch.float32)
    shape = read_hf_config(tmp_path / "m")
    assert shape.experts is not None
    assert (shape.experts.number, shape.experts.top_k) == (8, 2)
    assert parameters == sum(t.numel() for t in load_file(tmp_path / "m/model.safetensors").values())
