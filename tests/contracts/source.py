"""The project's Python files as syntax trees, for tests that read the source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where; `from a import b` counts as `a.b`."""

    module: str
    line: int


@functools.cache
def files(*folders: str) -> tuple[Path, ...]:
    """Python files under folders of the repository, sorted."""
    return tuple(sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's tree."""
    return tuple(ast.walk(tree(file)))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file, also inside functions and under TYPE_CHECKING."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}:{node.lineno}: relative import; write it absolute"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno)
