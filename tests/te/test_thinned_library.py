"""Thinning a library that nvcc made, Transformer Engine's: a third of a gigabyte of code for eight architectures."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools.thin_gpu_code import architectures, thin

SITE = Path(sysconfig.get_paths()["purelib"])
if not (SITE / "transformer_engine").is_dir():
    pytest.skip("needs the environment of `make test-te`", allow_module_level=True)


def test_the_copy_has_code_for_one_architecture_and_loads(tmp_path: Path) -> None:
    (library,) = SITE.glob("transformer_engine/**/libtransformer_engine.so")
    copy = tmp_path / library.name
    before = {a.number: a.size for a in architectures(library)}
    assert {80, 90, 100} < before.keys()
    assert thin(library, copy, frozenset({90})) == sum(before.values()) - before[90]
    assert copy.stat().st_size == library.stat().st_size
    assert {a.number: a.size - a.emptied for a in architectures(copy)} == dict.fromkeys(before, 0) | {90: before[90]}
    # Lazily, as Transformer Engine loads it: cuBLAS need not have all it may ask for.
    code = f"import ctypes, os, torch; ctypes.CDLL({str(copy)!r}, os.RTLD_LAZY).nvte_rmsnorm_fwd"
    libraries = os.pathsep.join(map(str, SITE.glob("nvidia/*/lib")))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LD_LIBRARY_PATH": libraries}, check=False)
    assert done.returncode == 0
