"""The unit tests lie where what they test lies."""

from __future__ import annotations

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
