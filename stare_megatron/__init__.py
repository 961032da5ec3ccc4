"""Reinforcement learning of large language models with STARE (arXiv 2606.19236), on Megatron-Core, Ray and vLLM.

The names below are the Python API, see docs/python_api.md. They are imported when first asked for, since processes that
need none of them import this package too.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stare_megatron.config import Config as Config
    from stare_megatron.errors import RunError as RunError
    from stare_megatron.errors import UserError as UserError
    from stare_megatron.run.api import FinishedRun as FinishedRun
    from stare_megatron.run.api import build_config as build_config
    from stare_megatron.run.api import evaluate as evaluate
    from stare_megatron.run.api import load_config as load_config
    from stare_megatron.run.api import read_evaluations as read_evaluations
    from stare_megatron.run.api import read_metrics as read_metrics
    from stare_megatron.run.api import train as train

__version__ = "0.1.0"

_MODULES = {
    "Config": "config",
    "RunError": "errors",
    "UserError": "errors",
    **dict.fromkeys(
        ("FinishedRun", "build_config", "evaluate", "load_config", "read_evaluations", "read_metrics", "train"),
        "run.api",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return module.__dict__[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
