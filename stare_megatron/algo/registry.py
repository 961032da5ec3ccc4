"""Algorithms by the name of their method: `ALGORITHM` of the file of algo/losses/ with that name, or the user's own."""

from __future__ import annotations

import importlib

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.config.methods import METHODS
from stare_megatron.errors import UserError

__all__ = ["ALGORITHMS", "Algorithm"]


class _Algorithms(dict[str, Algorithm]):
    """The registered ones; asked for an address, it gives the algorithm of the user's `Method` there."""

    def __missing__(self, name: str) -> Algorithm:
        algorithm = METHODS[name].algorithm
        if not isinstance(algorithm, Algorithm):
            found = type(algorithm).__name__
            raise UserError(f"algorithm.method = {name!r}: its algorithm is of type {found}, want Algorithm")
        return algorithm


ALGORITHMS = _Algorithms(
    {name: importlib.import_module(f"stare_megatron.algo.losses.{name}").ALGORITHM for name in METHODS}
)
