"""The smallest configuration that can be read, for tests that are about one table of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stare_megatron.config import Config, parse

MINIMAL: dict[str, dict[str, Any]] = {
    "run": {"name": "unit", "steps": 5},
    "model": {"path": "m"},
    "data": {"train": ["d.jsonl"]},
    "reward": {"name": "math"},
}


def tables(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`MINIMAL` with the keys of some tables changed or added."""
    return MINIMAL | {name: MINIMAL.get(name, {}) | dict(keys) for name, keys in changes.items()}


def configuration(**changes: Mapping[str, Any]) -> Config:
    """`tables`, read."""
    return parse(tables(**changes), "test")
