"""The unit tests lie where what they test lies."""

from __future__ import annotations

from tests.contracts.source import ROOT

# Folders of tests/unit for what is no package of stare_megatron.
OTHERS = {"docs", "examples", "tools"}


def test_unit_tests_mirror_the_package():
    packages = {p.parent.name for p in (ROOT / "stare_megatron").glob("*/__init__.py")}
    folders = {p.name for p in (ROOT / "tests/unit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - packages - OTHERS == set()
    assert [p.name for p in (ROOT / "tests/unit").glob("test_*.py")] == []
