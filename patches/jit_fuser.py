"""Megatron-Core compiles small functions with torch.compile; on a CPU that needs a C++ compiler and minutes."""

from __future__ import annotations

from types import ModuleType

from stare_megatron_patches import Patch, expect


def fix(module: ModuleType) -> None:
    """Run right after `megatron.core.jit`, before anybody has taken `jit_fuser` from it."""
    expect(module.enable_jit_fuser, "jit_fuser = torch.compile")
    expect(module.disable_jit_fuser, "jit_fuser = noop_decorator")
    module.disable_jit_fuser()


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.jit",
    why="jit_fuser is torch.compile, switched on at import.",
    upstream="megatron/core/jit.py: enable_jit_fuser() at the end of the module",
    remove_when="the fuser is off by default, or chosen by an environment variable",
    cpu_only=True,
    fix=fix,
)
