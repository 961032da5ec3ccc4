"""The unit tests lie where what they test lies, and try the same each time."""

from __future__ import annotations

import ast

from tests.contracts.source import ROOT

# Folders of tests/unit for what is no package of stare_megatron.
OTHERS = {"docs", "examples", "tools"}
# Packages whose tests need more than a unit test may: a folder of their own in tests/.
ELSEWHERE = {"sandbox"}


def test_unit_tests_mirror_the_package():
    packages = {p.parent.name for p in (ROOT / "stare_megatron").glob("*/__init__.py")}
    folders = {p.name for p in (ROOT / "tests/unit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - OTHERS == packages - ELSEWHERE
    for folder in folders:
        assert list((ROOT / "tests/unit" / folder).glob("test_*.py")), folder
    for package in ELSEWHERE:
        assert list((ROOT / "tests" / package).glob("test_*.py")), package
    assert [p.name for p in (ROOT / "tests/unit").glob("test_*.py")] == []


def test_property_tests_try_the_same_examples_each_time():
    """With examples drawn anew, a change is refused for a fault that it has not: `make fuzz` looks for those."""
    drawn_anew = [
        f"{file.relative_to(ROOT)}:{function.lineno}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        if "given" in (names := {_name(decorator) for decorator in function.decorator_list}) and "bounded" not in names
    ]
    assert drawn_anew == []


def _name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.id if isinstance(called, ast.Name) else ""
