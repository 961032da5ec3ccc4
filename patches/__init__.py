"""Fixes to packages we build on, one file per upstream problem.

`apply(package)` is called once per process, before the package is imported. It installs an import hook: a patched
module is fixed at the moment it has been executed, so that nobody can hold an unpatched copy. The ledger is the
tuple `PATCHES`; README.md shows it as a table.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from packaging.specifiers import SpecifierSet


class PatchError(RuntimeError):
    """The upstream source no longer is what a patch was written for, or it was imported too early."""


@dataclass(frozen=True)
class Patch:
    """One fix.

    `package`: distribution name; `versions`: those that have the problem; `target`: the module that is fixed;
    `cpu_only`: not needed on a GPU; `fix(module)` mends the executed target; `rewrite(tree, module name)` mends the
    source of every module under `target` before it is compiled.
    """

    package: str
    versions: str
    target: str
    why: str
    upstream: str
    remove_when: str
    cpu_only: bool
    fix: Callable[[ModuleType], None] | None = None
    rewrite: Callable[[ast.Module, str], ast.Module] | None = None


# Versions whose sources the patches were compared with.
SUPPORTED: dict[str, str] = {"megatron-core": ">=0.16.1,<0.20"}

# Order matters for fixes of one module only.
PATCHES: tuple[str, ...] = (
    "cpu_source",
    "jit_fuser",
    "rng_state",
    "router_gemm",
    "moe_split_sizes",
    "torch_adam_step",
    "bucket_padding",
    "linear_gemm",
)


def load() -> dict[str, Patch]:
    """The ledger: file name -> patch."""
    return {name: importlib.import_module(f"{__name__}.{name}").PATCH for name in PATCHES}


def expect(source_of: object, *lines: str) -> None:
    """Raise unless each of `lines` (stripped) is a line of the source of `source_of`."""
    have = {line.strip() for line in inspect.getsource(source_of).splitlines()}  # type: ignore[arg-type]
    for line in lines:
        if line not in have:
            raise PatchError(f"{source_of!r}: expected the line {line!r}; compare the patch with the new source")


def apply(package: str) -> None:
    """Install every patch of `package` (its distribution name). Call before importing it; a second call does nothing.

    Raises:
        PatchError: the package was imported before, or its version is outside of what a patch was written for.
    """
    from stare_megatron.host import device
    from stare_megatron_patches.import_hook import PatchingFinder

    if any(isinstance(f, PatchingFinder) and f.package == package for f in sys.meta_path):
        return
    on_cpu = device.current() is device.Device.CPU
    version = importlib.metadata.version(package)
    if version not in SpecifierSet(SUPPORTED[package], prereleases=True):
        raise PatchError(f"{package} {version} is outside of {SUPPORTED[package]}: compare the patches with its source")
    chosen = [
        patch
        for patch in load().values()
        if patch.package == package
        and (on_cpu or not patch.cpu_only)
        and version in SpecifierSet(patch.versions, prereleases=True)
    ]
    for patch in chosen:
        if patch.target in sys.modules:
            raise PatchError(f"{patch.target} was imported before its patch was applied")
    sys.meta_path.insert(0, PatchingFinder(package, chosen))  # pyright: ignore[reportArgumentType]
