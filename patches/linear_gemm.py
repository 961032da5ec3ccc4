"""On AMD processors MKL, torch's BLAS, leaves half of the vector units idle; oneDNN, which torch has too, does not."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import torch

from stare_megatron_patches import Patch, PatchError
from stare_megatron_patches.import_hook import insert_import

_MATMUL = "__linear_matmul__"
_PRODUCTS = {
    "torch.matmul(total_input, weight.t())",
    "grad_output.matmul(weight)",
    "grad_output.t().matmul(total_input)",
}
# Multiply-adds from which on the gain is beyond a call's own 10 us: 230 us of MKL at 2.6 GHz.
_LEAST = 1 << 23


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and MKL, which goes by the vendor, works on it with AVX2."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` [..., K] x [K, N], no graph: in float32 by oneDNN where that is faster, sums in another order."""
    large = b.dim() == 2 and a.numel() * b.shape[1] >= _LEAST
    if not large or a.dtype is not torch.float32 or not a.is_cpu or not onednn_is_faster():
        return torch.matmul(a, b)
    # As inductor calls it. It wants the weight of a linear layer, as rows or transposed: no copy is made of it here.
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


class _Products(ast.NodeTransformer):
    """`torch.matmul(a, b)` and `a.matmul(b)` -> `matmul(a, b)`; one with `out=` is left."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        text = ast.unparse(node)
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr != "matmul" or node.keywords:
            return node
        self.seen.add(text)
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        arguments = node.args if of_torch else [node.func.value, *node.args]
        return ast.copy_location(ast.Call(ast.Name(_MATMUL, ast.Load()), arguments, []), node)


def rewrite(tree: ast.Module, name: str) -> ast.Module:
    """Let the linear layers' products, forward and backward, be made by `matmul`.

    Raises:
        PatchError: one of them is not where it was.
    """
    visitor = _Products()
    tree = visitor.visit(tree)
    if missing := _PRODUCTS - visitor.seen:
        raise PatchError(f"{name} has no {', '.join(sorted(missing))}; compare the patch with the new source")
    return insert_import(tree, __name__, "matmul", _MATMUL)


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.tensor_parallel.layers",
    why="float32 layers on AMD processors run at the half of what they can, in MKL's kernels for AVX2.",
    upstream="https://github.com/pytorch/pytorch (aten::mm is MKL's in float32, whatever the processor)",
    remove_when="torch takes oneDNN, or MKL its kernels for AVX-512, on processors of AMD",
    cpu_only=True,
    rewrite=rewrite,
)
