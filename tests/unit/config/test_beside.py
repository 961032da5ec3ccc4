"""What lies beside a user's file is found by that file, and by nobody else."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from stare_megatron.config import beside
from stare_megatron.config.registry import load_object
from stare_megatron.errors import UserError
from tests.contracts.source import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a user; nobody finds anything in it afterwards."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return tmp_path


def test_a_neighbour_finds_neighbours_too_and_later(folder):
    (folder / "first_of_beside.py").write_text(
        "import importlib\n"
        "from second_of_beside.inner import VALUE\n"
        "def late():\n"
        "    return importlib.import_module('third_of_beside').VALUE\n"
    )
    (folder / "second_of_beside").mkdir()
    (folder / "second_of_beside/__init__.py").write_text("")
    (folder / "second_of_beside/inner.py").write_text("from fourth_of_beside import VALUE\n")
    (folder / "third_of_beside.py").write_text("VALUE = 3\n")
    (folder / "fourth_of_beside.py").write_text("VALUE = 4\n")
    assert load_object(f"{folder}/first_of_beside.py:VALUE", "key") == 4
    assert load_object(f"{folder}/first_of_beside.py:late", "key")() == 3


def test_a_library_does_not_find_them(folder, tmp_path_factory, monkeypatch):
    """As transformers looks for a package `kernels` that is not installed."""
    library = tmp_path_factory.mktemp("library")
    (library / "library_of_beside.py").write_text(
        "import importlib.util\nFOUND = importlib.util.find_spec('optional_of_beside') is not None\n"
        "try:\n    import optional_of_beside\nexcept ImportError:\n    optional_of_beside = None\n"
    )
    monkeypatch.syspath_prepend(library)
    (folder / "optional_of_beside.py").write_text("raise RuntimeError('nobody asked for it')\n")
    (folder / "own_of_beside.py").write_text("import library_of_beside as VALUE\n")
    library_module = load_object(f"{folder}/own_of_beside.py:VALUE", "key")
    assert not library_module.FOUND
    assert library_module.optional_of_beside is None
    assert importlib.util.find_spec("optional_of_beside") is None


def test_two_files_of_a_folder_share_what_is_beside_them(folder):
    (folder / "shared_of_beside.py").write_text("VALUE = object()\n")
    for name in ("one", "two"):
        (folder / f"{name}_of_beside.py").write_text("from shared_of_beside import VALUE\n")
    one, two = (load_object(f"{folder}/{name}_of_beside.py:VALUE", "key") for name in ("one", "two"))
    assert one is two
    assert str(folder) not in sys.path


@pytest.mark.parametrize("code", ["from json import mine\n", "import json\nVALUE = json.mine\n"])
def test_a_neighbour_that_a_package_hides_is_named(folder, code):
    (folder / "json.py").write_text("mine = 1\n")
    (folder / "hidden_of_beside.py").write_text(code)
    with pytest.raises(UserError) as e:
        load_object(f"{folder}/hidden_of_beside.py:VALUE", "key")
    assert f"{folder}/json.py has the name of a package" in str(e.value)
    assert "rename it" in str(e.value)


def test_names_in_the_current_directory_that_are_something_elses_are_told(tmp_path, monkeypatch):
    """What is installed is found as ever, also where the directory is on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("kernels.py", "queue.py", "numpy.py", "mine.py", "stare_megatron.py"):
        (tmp_path / name).write_text("")
    for package in ("datasets", "plain"):
        (tmp_path / package).mkdir()
    (tmp_path / "datasets/__init__.py").write_text("")
    said = {note.partition(";")[0].removeprefix(f"{tmp_path}/") for note in beside.shadows(tmp_path)}
    assert {
        "kernels.py has the name of a package that transformers looks for",
        "queue.py has the name of a module of Python",
        "numpy.py has the name of an installed package",
    } <= said
    assert any(line.startswith("datasets has the name of ") for line in said)
    assert not any(line.startswith(("mine.py", "plain")) for line in said)


def test_this_repository_is_a_directory_to_start_from():
    assert beside.shadows(ROOT) == []


def test_a_fault_in_a_library_blames_none_of_its_files(folder, tmp_path_factory, monkeypatch):
    """It has modules of such names on purpose."""
    library = tmp_path_factory.mktemp("library")
    (library / "json.py").write_text("")
    (library / "faulty_of_beside.py").write_text("import json\njson.nothing\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(library)])
    (folder / "mine_of_beside.py").write_text("import faulty_of_beside\n")
    with pytest.raises(UserError, match=r"AttributeError: module 'json' has no attribute 'nothing'$"):
        load_object(f"{folder}/mine_of_beside.py:VALUE", "key")
