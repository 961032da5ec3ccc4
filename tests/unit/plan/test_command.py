"""The command: what it prints, its exit codes, calibration files, lengths from a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stare_megatron.__main__ import main
from stare_megatron.errors import UserError
from stare_megatron.plan import calibrate, hardware, lengths
from stare_megatron.plan.command import Options, run
from tests.contracts.source import ROOT
from tests.guide import blocks
from tests.unit.plan.models import MODELS

RUN = """
[run]
name = "planned"
steps = 10
[model]
path = "{model}"
[data]
train = ["prompts.jsonl"]
[reward]
name = "math"
[rollout]
max_response_tokens = 8192
[trainer]
world_size = 32
tensor_parallel = 8
sequence_parallel = true
micro_batch_tokens = 16384
logits_chunk_tokens = 4096
recompute = "full"
[inference]
engines = 8
tensor_parallel = 4
"""
SHARE = "inference.vllm.gpu_memory_utilization=0.49"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """Of Qwen3-32B, whose folder holds its config.json alone."""
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(model=MODELS / "qwen3-32b"))
    return file


def test_a_plan_that_fits(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(toml), SHARE]) == 0
    shown = capsys.readouterr().out
    for part in ("32 x h100", "at most 4,095,857,664 parameters a rank", "KV cache", "matrix products", "fits:"):
        assert part in shown


def test_one_that_does_not_fit(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(toml)]) == 1
    assert "does not fit  an engine's weights" in capsys.readouterr().out


def test_json(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(toml), SHARE, "--json", "--gpu", "h200"]) == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert table["fits"] is True
    assert table["gpu"]["name"] == "h200"
    assert table["seconds"]["step"] == pytest.approx(
        sum(table["seconds"][phase] for phase in ("rollout", "score", "update", "push"))
    )
    for use in table["memory"]:
        assert use["total"] == pytest.approx(sum(use["parts"].values()))
    assert main(["plan", str(toml), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["seconds"]["rollout"] is None


def test_it_imports_nothing_that_takes_long(toml: Path) -> None:
    """In a process of its own; it takes about a second."""
    code = (
        "import sys\nfrom stare_megatron.__main__ import main\n"
        f"assert main(['plan', {str(toml)!r}, {SHARE!r}]) == 0\n"
        "print(*{'torch', 'vllm', 'ray', 'megatron', 'transformers'} & sys.modules.keys(), 'after all')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "after all"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": "h1000"}, "known are a100, h100"),
        ({"kept": 0.0}, "--kept 0"),
        ({"response": -1.0}, "not below 0"),
        ({"constants": Path("/nowhere/gpu.json")}, "--calibrate"),
    ],
)
def test_refused(toml: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run([str(toml)], Options(**options), Console())


def test_a_plan_wants_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "name the TOML file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h100", "H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"])
def test_a_gpu_is_found_by_its_drivers_name(name: str) -> None:
    assert hardware.find(name).name in name.lower()


def test_constants_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    hardware.write_constants(file, {"gemm": 0.5, "bandwidth": 0.8})
    found = hardware.read_constants(file)
    assert (found.gemm, found.bandwidth) == (0.5, 0.8)
    assert found.attention == hardware.CONSTANTS.attention
    for wrong in ({"gemms": 0.5}, {"gemm": 0}, {"gemm": "a"}, {"gemm": True}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="no constant of the plan"):
            hardware.read_constants(file)


def test_lengths_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": i, "response/length_mean": 900.0, "response/length_max": 4000.0} for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengths.of_run(tmp_path, 512, longest=8192, longest_prompt=1024)
    assert found.response == pytest.approx(900, rel=0.02)
    assert max(found.responses) == pytest.approx(4000, rel=0.05)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    with pytest.raises(UserError, match="response/length_mean"):
        lengths.of_run(tmp_path, 512, longest=8192, longest_prompt=1024)


def test_what_calibration_measures_is_positive() -> None:
    """On a CPU, with small sizes: that each measurement runs. Its numbers mean nothing here."""
    place = torch.device("cpu")
    assert calibrate.products(place, 64, 32, 64) > 0
    assert calibrate.attention(place, 1, 64) > 0
    assert calibrate.copies(place, 1 << 16) > 0
    assert calibrate.from_host(place, 1 << 16) > 0
    assert 0 < calibrate.launches(place, 50) < 0.1


def test_calibration_wants_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    assert main(["plan", "--calibrate", str(tmp_path / "gpu.json")]) == 2
    assert "no GPU is visible" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_the_page_shows_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "examples/tool_use_7b/run.toml", "model.path=tests/data/models/qwen2.5-7b"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())
    (shown,) = blocks("planning")["text"]
    assert shown.rstrip() == printed
