"""Habits that hide faults, looked for in the syntax tree."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from tests.contracts.source import ROOT, files, nodes, relative, tree
from tests.shellcheck import complaints

SCRIPTS = [ROOT / ".ci/run", *sorted(ROOT.glob("tools/*.sh"))]
PRODUCT = ("stare_megatron", "patches", "tools")


def places(match) -> list[str]:
    return [f"{relative(f)}:{node.lineno}" for f in files(*PRODUCT) for node in nodes(f) if match(node)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say_of_our_scripts(script):
    assert complaints(script) == ""


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

    def match(node):
        if not isinstance(node, ast.ExceptHandler):
            return False
        last = node.body[-1]
        return _is_broad(node) and not (isinstance(last, ast.Raise) and last.exc is None)

    assert places(match) == []


def _is_broad(node):
    items = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(
        item is None or (isinstance(item, ast.Name) and item.id in ("Exception", "BaseException")) for item in items
    )


def test_no_more_broad_excepts_than_there_are():
    """Those that clean up and raise again: a new one needs a reason, and a new number here."""
    broad = places(lambda node: isinstance(node, ast.ExceptHandler) and _is_broad(node))
    assert len(broad) <= 9, broad


def test_type_rules_are_switched_off_by_the_line_only():
    """A comment on a line of its own switches a rule off for the whole file."""
    whole = [
        f"{relative(f)}: {line}"
        for f in files(*PRODUCT)
        for line in f.read_text().splitlines()
        if re.match(r"#\s*(pyright|type|mypy)\s*:", line)
    ]
    assert whole == []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    tables = [settings, *settings["executionEnvironments"]]
    assert [key for table in tables for key in table if key.startswith("report")] == []


def test_every_parameter_and_result_has_a_type():
    """Of Triton's kernels the compiler knows the types."""

    def match(node):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_kernel(node):
            return False
        a = node.args
        named = [p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
        every = [*named, *(p for p in (a.vararg, a.kwarg) if p is not None)]
        return node.returns is None or any(p.annotation is None for p in every)

    assert places(match) == []


def _is_kernel(node):
    return any(ast.unparse(d).startswith("triton.") for d in node.decorator_list)


def test_no_assert_false_or_print_in_the_package():
    """Output goes through the console sink; only the command line and tools print."""

    def match(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"

    allowed = ("stare_megatron/__main__.py:", "tools/")
    assert [p for p in places(match) if not p.startswith(allowed)] == []


def test_every_module_says_what_it_is():
    silent = [relative(f) for f in files(*PRODUCT) if f.read_text().strip() and not ast.get_docstring(tree(f))]
    assert silent == []
