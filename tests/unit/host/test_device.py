"""GPUs as a driver lists them and CUDA_VISIBLE_DEVICES names them, and Transformer Engine that is there and broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stare_megatron.errors import UserError
from stare_megatron.host import device

GIB = 2**30
SMI = """#!/bin/sh
case "$1" in
-L) printf 'GPU 0: NVIDIA H100 (UUID: GPU-aa1)\\n  MIG 3g.40gb     Device  0: (UUID: MIG-cc)\\n' ;;
*) printf 'NVIDIA H100, 81559, GPU-aa1\\nNVIDIA H200, 143771, GPU-bb2\\nNVIDIA L4, [N/A], GPU-bb3\\n' ;;
esac
"""
H100, H200, L4 = ("NVIDIA H100", 81559 * 2**20), ("NVIDIA H200", 143771 * 2**20), ("NVIDIA L4", 0)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [H100, H200, L4]),
        ("1,0", [H200, H100]),
        ("GPU-bb2", [H200]),
        ("GPU-bb3, GPU-aa", [L4, H100]),  # the beginning of a UUID is enough
        ("MIG-cc", [("MIG 3g.40gb", 40 * GIB)]),
        ("MIG-cc,MIG-unknown", [("MIG 3g.40gb", 40 * GIB), ("MIG", 0)]),
        ("0,7,1", [H100]),  # CUDA stops at the first that is none
        ("GPU-zz", []),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_visible_gpus_are_those_cuda_sees(monkeypatch, tmp_path, visible, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("STARE_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(gpu.name, gpu.bytes) for gpu in device.gpus()] == found


@pytest.mark.parametrize(
    "fault",
    [
        "ImportError('transformer_engine_torch.so: undefined symbol: _ZN3c10')",
        "FileNotFoundError('Could not find shared object file: transformer_engine_torch')",
        "OSError('libtransformer_engine.so: cannot open shared object file')",
        "RuntimeError('Found empty transformer-engine meta package')",
    ],
)
def test_a_broken_transformer_engine_is_refused_by_name(monkeypatch, tmp_path, fault):
    """As it is where its extension was built for another torch: it is found, and cannot be imported."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text(f"raise {fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # hidden, where ranks were imported
    monkeypatch.setattr(device, "current", lambda: device.Device.CUDA)
    device.has_transformer_engine.cache_clear()
    with pytest.raises(UserError, match=r"Transformer Engine is installed and cannot be imported") as e:
        device.has_transformer_engine()
    assert fault.split("'")[1] in str(e.value)
    assert "transformer_engine missing, transformer_engine_torch missing, torch 2." in str(e.value)
    assert "tools/build_te.sh" in str(e.value)
    sys.modules.pop("transformer_engine", None)
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    device.has_transformer_engine.cache_clear()
    assert not device.has_transformer_engine()
    device.has_transformer_engine.cache_clear()


@pytest.mark.parts
def test_a_rank_refuses_it_before_megatron_core_is_imported(tmp_path):
    """Whose import fails less clearly then, or goes on without."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("raise FileNotFoundError('transformer_engine_torch')\n")
    code = """
import sys
from stare_megatron.cluster.trainers import TrainerActor
from stare_megatron.errors import UserError
from stare_megatron.host import device
device.current = lambda: device.Device.CUDA
kind = TrainerActor.__ray_metadata__.modified_class
try:
    kind.__new__(kind).start("127.0.0.1", 1)
except UserError as e:
    print("megatron.core" in sys.modules, e)
"""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.startswith("False Transformer Engine is installed and cannot be imported"), done.stderr


@pytest.mark.parts
def test_megatron_core_does_not_see_what_serves_nothing(tmp_path):
    """Or Apex: on a CPU it would take their Adam, which works on GPUs only."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    code = """
from stare_megatron.trainer import optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
print(HAVE_TE, optimizer.upstream.Adam.__module__)
"""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "STARE_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "False stare_megatron_patches.torch_adam_step\n", done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_an_engine_is_not_asked_for_a_sampler_that_is_not_there(monkeypatch, tmp_path, installed):
    """vLLM imports FlashInfer without looking, unless told not to."""
    if installed:
        (tmp_path / "flashinfer.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device, "current", lambda: device.Device.CUDA)
    assert ("VLLM_USE_FLASHINFER_SAMPLER" in device.engine_environment()) is not installed


@pytest.mark.parametrize(
    ("kind", "colocated", "expected"),
    [
        (device.Device.CPU, True, {"auto": "sharded", "sharded": "sharded", "whole": "gloo"}),
        (device.Device.CUDA, True, {"auto": "cuda_ipc", "sharded": "sharded", "whole": "cuda_ipc"}),
        (device.Device.CUDA, False, {"auto": "nccl", "sharded": "sharded", "whole": "nccl"}),
    ],
)
def test_how_weights_travel(monkeypatch, kind, colocated, expected):
    monkeypatch.setattr(device, "current", lambda: kind)
    assert {method: device.weight_transport(colocated, method) for method in expected} == expected
