"""Files of at most 400 lines, functions of at most 80: a reader's budget. An exception needs a reason."""

from __future__ import annotations

import ast

from tests.contracts.source import files, nodes, relative

ALL = ("stare_megatron", "patches", "tools", "tests")
FILE_LINES = 400
FUNCTION_LINES = 80

# Path -> why it is longer.
LONG_FILES: dict[str, str] = {}
# Path:function -> why it is longer.
LONG_FUNCTIONS: dict[str, str] = {}


def long_files() -> dict[str, int]:
    counts = {
        relative(f): len(f.read_text().splitlines()) for f in files("stare_megatron", "patches", "tools", "tests")
    }
    return {name: n for name, n in counts.items() if n > FILE_LINES}


def long_functions() -> dict[str, int]:
    found = {}
    for file in files(*ALL):
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found[f"{relative(file)}:{node.name}"] = lines
    return found


def test_files_are_short():
    assert {k: v for k, v in long_files().items() if k not in LONG_FILES} == {}


def test_functions_are_short():
    assert {k: v for k, v in long_functions().items() if k not in LONG_FUNCTIONS} == {}


def test_exceptions_are_still_needed():
    assert LONG_FILES.keys() - long_files().keys() == set()
    assert LONG_FUNCTIONS.keys() - long_functions().keys() == set()
    assert all([*LONG_FILES.values(), *LONG_FUNCTIONS.values()])


def test_functions_of_a_run_take_few_parameters():
    """At most eight, `self` included: more belong together in a type."""
    found = {}
    for file in files("stare_megatron/run"):
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
                if count > 8:
                    found[f"{relative(file)}:{node.name}"] = count
    assert found == {}
