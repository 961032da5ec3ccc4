"""Methods by name: `ALGORITHM` of the file of algo/losses/ with that name, for each line of `methods.METHODS`."""

from __future__ import annotations

import importlib

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.config.methods import METHODS

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, Algorithm] = {
    name: importlib.import_module(f"stare_megatron.algo.losses.{name}").ALGORITHM for name in METHODS
}
