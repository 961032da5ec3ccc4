"""Part `environment`: what is installed, the GPU and its driver, and libraries whose GPU code was thinned."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import torch

from stare_megatron.run.folder import package_versions
from tools.gpu_check_parts.outcome import Context, Outcome
from tools.thin_gpu_code import architectures, serves

_WITH_GPU_CODE = ("vllm", "transformer_engine")
_LARGE = 1 << 20  # bytes; smaller libraries hold no kernels
_FIELDS = ("name", "driver_version", "memory.total", "compute_mode", "clocks.max.sm", "power.limit")


def check(context: Context) -> Outcome:
    """Fails where the GPU does not compute, or a library has machine code for none of its kind."""
    outcome = Outcome()
    numbers = outcome.numbers
    numbers["packages"] = package_versions()
    numbers["torch built for CUDA"] = str(torch.version.cuda)
    numbers["triton"] = importlib.util.find_spec("triton") is not None
    gpu = 0
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        gpu = 10 * properties.major + properties.minor
        numbers["GPU"] = {
            "name": properties.name,
            "architecture": f"sm_{gpu}",
            "GiB": properties.total_memory / 2**30,
            "GPUs seen": torch.cuda.device_count(),
            "multiprocessors": properties.multi_processor_count,
        }
        numbers["driver"] = _driver()
        a = torch.randn(512, 512, device="cuda")
        exact = a.double() @ a.double()
        outcome.near("largest error of a product", float(((a @ a).double() - exact).abs().max()), 0.0, 0.5)
    thinned: dict[str, Any] = {}
    for library in libraries():
        found = architectures(library)
        emptied = [a.number for a in found if a.size and a.emptied == a.size]
        whole = [a.number for a in found if a.emptied < a.size]
        if emptied:
            thinned[library.name] = f"code left for {', '.join(f'sm_{n}' for n in whole) or 'nothing'}"
            if gpu and not any(serves(n, gpu) for n in whole):
                outcome.fail(
                    f"{library.name} was thinned to {whole}, this GPU is {gpu}: pack it again with --gpu {gpu}"
                )
    numbers["thinned libraries"] = thinned or "none"
    return outcome


def libraries() -> list[Path]:
    """Shared libraries of the packages that bring GPU code of their own."""
    found = []
    for package in _WITH_GPU_CODE:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [p for p in sorted(Path(folder).rglob("*.so*")) if p.is_file() and p.stat().st_size > _LARGE]
    return found


def _driver() -> str:
    query = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return f"nvidia-smi does not answer: {e}"
