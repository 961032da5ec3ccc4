"""Habits that hide faults, looked for in the syntax tree."""

from __future__ import annotations

import ast

from tests.contracts.source import files, nodes, relative, tree

PRODUCT = ("stare_megatron", "patches", "tools")


def places(match) -> list[str]:
    return [f"{relative(f)}:{node.lineno}" for f in files(*PRODUCT) for node in nodes(f) if match(node)]


def test_no_getattr_with_a_default():
    """A misspelt attribute must fail."""

    def match(node):
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and (len(node.args) > 2)
        )

    assert places(match) == []


def test_no_broad_except():
    """`except Exception` turns a bug into a wrong result, unless it cleans up and raises the same again."""

    def names(node):
        items = node.elts if isinstance(node, ast.Tuple) else [node]
        return {item.id for item in items if isinstance(item, ast.Name)}

    def match(node):
        if not isinstance(node, ast.ExceptHandler):
            return False
        broad = node.type is None or bool(names(node.type) & {"Exception", "BaseException"})
        last = node.body[-1]
        return broad and not (isinstance(last, ast.Raise) and last.exc is None)

    assert places(match) == []


def test_no_assert_false_or_print_in_the_package():
    """Output goes through the console sink; only the command line and tools print."""

    def match(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"

    allowed = ("stare_megatron/__main__.py:", "tools/")
    assert [p for p in places(match) if not p.startswith(allowed)] == []


def test_every_module_says_what_it_is():
    silent = [relative(f) for f in files(*PRODUCT) if f.read_text().strip() and not ast.get_docstring(tree(f))]
    assert silent == []
