"""The MoE router asks for a Transformer Engine function that was never imported."""

from __future__ import annotations

from types import ModuleType

from stare_megatron_patches import Patch, expect


def fix(module: ModuleType) -> None:
    """Bind the missing name to None, which `RouterGatingLinearFunction` understands."""
    condition = "if te_general_gemm is not None and router_dtype != torch.float64:"
    expect(module.RouterGatingLinearFunction.forward, condition)
    if not module.HAVE_TE:
        module.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.moe_utils",
    why="NameError: te_general_gemm, without Transformer Engine.",
    upstream="megatron/core/transformer/moe/moe_utils.py: the import of transformer_engine",
    remove_when="megatron-core 0.16 is no longer supported (0.17 binds the name)",
    cpu_only=False,
    fix=fix,
)
