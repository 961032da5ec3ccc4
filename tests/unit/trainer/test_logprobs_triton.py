"""The Triton kernels without a GPU: interpreted, and compiled for GPUs that are not there.

Triton decides at its import whether it interprets, so both happen in processes of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stare_megatron.host import device

ROOT = Path(__file__).parents[3]


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parts
def test_under_the_interpreter():
    """tests/gpu/test_triton.py, all of it."""
    cases = "tests/gpu/test_triton.py"
    out = _run("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    print(out[-2000:])
    summary = out.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed.*", summary), summary
    assert "skipped" not in summary
    assert int(summary.split()[0]) >= 40


CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    cache = str(tmp_path_factory.mktemp("triton"))
    command = ("tools/inspect_kernels.py", "--json", *map(str, CAPABILITIES))
    return json.loads(_run(*command, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0"))


@pytest.mark.parts
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_for_gpus(compiled, capability):
    """By Triton's own compiler and assembler: 128-bit loads and stores of the logits, nothing spilled, registers for
    at least four programs a multiprocessor, one exponential an element for log-prob and entropy and one a group of them
    to rescale, and few enough instructions that memory stays the bound."""
    kernels = [kernel for kernel in compiled if kernel["capability"] == capability]
    assert {k["dtype"] for k in kernels} == {"bf16", "fp32"}
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["wide_loads"] * 16 == kernel["bytes"], kernel
        assert kernel["wide_stores"] * 16 == (2 * kernel["bytes"] if kernel["name"] == "backward" else 0), kernel
        assert kernel["registers"] <= 64, kernel
        if kernel["dtype"] == "bf16" and not kernel["options"]:
            assert kernel["exponentials"] == (42 / 40 if kernel["name"] == "forward" else 1.0), kernel
        if kernel["dtype"] == "bf16" and kernel["name"] == "forward":
            most = {"": 7.5, "sensitivity": 10.5, "sensitivity, raw": 13.75}[kernel["options"]]
            assert 6.0 < kernel["instructions"] <= most, kernel


def test_the_pytorch_path_serves_cpus(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not device.triton_serves(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.triton_serves(torch.zeros(1))
    monkeypatch.setenv("STARE_TRITON", "0")
    assert not device.triton_serves(torch.zeros(1))
