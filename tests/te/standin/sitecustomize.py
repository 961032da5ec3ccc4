"""Transformer Engine's Python part without its compiled extension, in every process that has this folder on PYTHONPATH.

Its modules, their parameters and their checkpoints are the real ones; what would run a kernel raises. Values of the
enumerations are those of transformer_engine/common/include.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any

_TENSORS = ("GEMM1_INPUT", "GEMM1_WEIGHT", "GEMM1_OUTPUT", "GEMM2_INPUT", "GEMM2_WEIGHT", "GEMM2_OUTPUT")
_GRADIENTS = ("GRAD_OUTPUT1", "GRAD_INPUT1", "GRAD_OUTPUT2", "GRAD_INPUT2", "GRAD_OUTPUT3", "GRAD_INPUT3")
_DTYPES = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
_BACKENDS = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}


class _Absent(type):
    """Whatever else the extension holds: a name that can be passed on and not be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{cls.__name__}.{name}", (), {})

    def __int__(cls) -> int:
        return 0

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{cls.__name__}: the stand-in for transformer_engine_torch has no kernels")


class _Extension(ModuleType):
    DType = IntEnum("DType", _DTYPES)
    FP8FwdTensors = IntEnum("FP8FwdTensors", (*_TENSORS, "GEMM3_INPUT", "GEMM3_WEIGHT", "GEMM3_OUTPUT"), start=0)
    FP8BwdTensors = IntEnum("FP8BwdTensors", _GRADIENTS, start=0)
    NVTE_Fused_Attn_Backend = IntEnum("NVTE_Fused_Attn_Backend", _BACKENDS)
    __all__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder):
    """Keeps `transformer_engine.common` from loading the extension."""

    target = "transformer_engine.common"

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.target:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_mend(module: ModuleType) -> None:
            execute(module)
            module.__dict__["load_framework_extension"] = lambda framework: None
            sys.modules["transformer_engine_torch"] = _Extension("transformer_engine_torch")

        spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
