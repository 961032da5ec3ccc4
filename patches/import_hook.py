"""A meta-path finder that mends modules while they are imported (pytest rewrites asserts in the same way)."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import marshal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType

from stare_megatron_patches import Patch


class PatchingFinder(MetaPathFinder):
    """Finds the targets of `patches` by the ordinary path finder and gives them a `PatchingLoader`."""

    def __init__(self, package: str, patches: Sequence[Patch]) -> None:
        self.package = package
        self._rewrites = [p for p in patches if p.rewrite]
        self._fixes = [p for p in patches if p.fix]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        rewrites = [p for p in self._rewrites if name == p.target or name.startswith(p.target + ".")]
        fixes = [p for p in self._fixes if name == p.target]
        if not rewrites and not fixes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = PatchingLoader(spec.loader.name, spec.loader.path, rewrites, fixes)
        return spec


class PatchingLoader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source, executes it, then runs the fixes.

    The code is kept beside Python's own byte code: some 180 modules take a rank 1.5 CPU seconds to rewrite.
    """

    def __init__(self, name: str, path: str, rewrites: list[Patch], fixes: list[Patch]) -> None:
        super().__init__(name, path)
        self._rewrites = rewrites
        self._fixes = fixes

    def get_code(self, fullname: str) -> CodeType | None:
        if not self._rewrites:
            return super().get_code(fullname)
        path = self.get_filename(fullname)
        source = self.get_data(path)
        # Of whatever the code depends on; the path is in it.
        key = hashlib.sha256(importlib.util.MAGIC_NUMBER)
        for part in (f"{sys.flags.optimize} {path}".encode(), source):
            key.update(hashlib.sha256(part).digest())
        for name in (__name__, *(patch.rewrite.__module__ for patch in self._rewrites if patch.rewrite)):
            key.update(_source_digest(name))
        cache = importlib.util.cache_from_source(path, optimization="rewritten")
        code = self._cached(cache, key.digest())
        if code is None:
            tree = ast.parse(source, path)
            for patch in self._rewrites:
                assert patch.rewrite is not None
                tree = patch.rewrite(tree, fullname)
            code = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
            if not sys.dont_write_bytecode:
                # Whole or not at all; not on a read-only disk.
                self.set_data(cache, key.digest() + marshal.dumps(code))
        return code

    def _cached(self, cache: str, key: bytes) -> CodeType | None:
        """None where there is no code of this key, or its file is damaged."""
        try:
            data = self.get_data(cache)
            return marshal.loads(data[len(key) :]) if data.startswith(key) else None
        except (OSError, EOFError, ValueError, TypeError):
            return None

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        # A fix may import the package's other modules; they must find this one complete.
        sys.modules[module.__name__] = module
        for patch in self._fixes:
            assert patch.fix is not None
            patch.fix(module)


@functools.cache
def _source_digest(name: str) -> bytes:
    """Of the source of a module that rewrites: it is read once, not for each module that it rewrites."""
    return hashlib.sha256(Path(sys.modules[name].__file__ or "").read_bytes()).digest()


def insert_import(tree: ast.Module, module: str, name: str, alias: str) -> ast.Module:
    """Put `from module import name as alias` before everything but what has to be first; in place."""
    first = 0
    for i, node in enumerate(tree.body):
        docstring = i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            first = i + 1
    tree.body.insert(first, ast.ImportFrom(module, [ast.alias(name, alias)], 0))
    return tree
