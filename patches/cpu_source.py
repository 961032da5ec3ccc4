"""Megatron-Core has no CPU path: it names CUDA throughout. Its source is rewritten, torch is left alone."""

from __future__ import annotations

import ast
import re

from stare_megatron_patches import Patch, PatchError
from stare_megatron_patches.import_hook import insert_import

_STANDIN = "__cpu_standin__"
_TENSOR_TYPE = re.compile(r"^torch\.cuda\.(\w+Tensor)$")
# Modules that must need rewriting; if they do not, upstream has changed its mind about CPUs.
_MUST_CHANGE = {"megatron.core.distributed.param_and_grad_buffer", "megatron.core.tensor_parallel.random"}


def _is_torch_cuda(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )


class _ToCpu(ast.NodeTransformer):
    """`torch.cuda` -> the stand-in, "cuda" -> "cpu", `.cuda()` -> `.cpu()`, pinned memory -> ordinary memory."""

    def __init__(self) -> None:
        self.changes = 0

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if _is_torch_cuda(node):
            self.changes += 1
            return ast.copy_location(ast.Name(_STANDIN, ast.Load()), node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, str):
            return node
        text = "cpu" if node.value == "cuda" else _TENSOR_TYPE.sub(r"torch.\1", node.value)
        if text == node.value:
            return node
        self.changes += 1
        return ast.copy_location(ast.Constant(text), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        node.keywords = [k for k in node.keywords if k.arg != "pin_memory"]
        if isinstance(node.func, ast.Attribute) and not _is_torch_cuda(node.func):
            if node.func.attr == "cuda":
                self.changes += 1
                node.func.attr, node.args, node.keywords = "cpu", [], []
            elif node.func.attr == "pin_memory":
                self.changes += 1
                return node.func.value
        return node


def rewrite(tree: ast.Module, name: str) -> ast.Module:
    """Rewrite one module of megatron.core for the CPU.

    Raises:
        PatchError: a module known to need it has nothing to rewrite.
    """
    visitor = _ToCpu()
    tree = visitor.visit(tree)
    if not visitor.changes and name in _MUST_CHANGE:
        raise PatchError(f"{name} names CUDA no more: is the CPU supported upstream now?")
    return insert_import(tree, "stare_megatron_patches.cpu_standin", "cuda", _STANDIN)


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core",
    why="Tensors are made on torch.cuda.current_device(); nothing runs where there is no GPU.",
    upstream="https://github.com/NVIDIA/Megatron-LM (CPU training is out of its scope)",
    remove_when="Megatron-Core makes its tensors on a configurable device",
    cpu_only=True,
    rewrite=rewrite,
)
