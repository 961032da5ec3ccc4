"""Files of exact versions: within what pyproject.toml asks, and what the tool takes from an environment."""

from __future__ import annotations

import re
import runpy
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools/make_constraints.py"))
FILES = sorted((ROOT / "tools/constraints").glob("*.txt"))

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


def pinned(file: Path) -> dict[str, str]:
    return dict(line.split("==") for line in lines(file))


def asked() -> list[Requirement]:
    return [r for r in map(Requirement, TOOL["asked"]()) if r.marker is None or r.marker.evaluate({"extra": ""})]


def unmet(requirements: list[Requirement], versions: dict[str, str]) -> list[str]:
    """Requirements that a file leaves open or contradicts."""
    return [
        str(r)
        for r in requirements
        if not r.specifier.contains(versions.get(canonicalize_name(r.name), "0"), prereleases=True)
        or canonicalize_name(r.name) not in versions
    ]


def test_there_is_one() -> None:
    assert FILES


@each
def test_a_line_is_a_package_and_its_version(file: Path) -> None:
    found = lines(file)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", line) for line in found)
    assert list(pinned(file)) == sorted({line.split("==")[0] for line in found})


@each
def test_it_holds_what_pyproject_asks_of_everybody_and_of_cpu_and_dev(file: Path) -> None:
    assert unmet(asked(), pinned(file)) == []


def test_a_version_out_of_range_and_a_package_left_out_are_seen() -> None:
    requirements = [Requirement("ray>=2.60,<2.61"), Requirement("numpy>=1.26")]
    assert unmet(requirements, {"ray": "2.61.0"}) == ["ray<2.61,>=2.60", "numpy>=1.26"]


@each
def test_its_packages_fit_each_other(file: Path) -> None:
    """As far as they are installed here at the file's versions, whose metadata then says what they ask of others."""
    versions = pinned(file)
    here = {canonicalize_name(one.metadata["Name"]): one for one in metadata.distributions()}
    same = [here[name] for name, version in versions.items() if name in here and here[name].version == version]
    asks = [
        r
        for one in same
        for r in map(Requirement, one.requires or [])
        if (r.marker is None or r.marker.evaluate({"extra": ""})) and canonicalize_name(r.name) in versions
    ]
    assert unmet(asks, versions) == []


def test_the_tool_writes_what_this_environment_has() -> None:
    versions = dict(line.split("==") for line in TOOL["page"]("x").splitlines() if not line.startswith("#"))
    assert unmet(asked(), versions) == []
    assert versions["pluggy"] == metadata.version("pluggy"), "which only pytest asks for"
    assert not {"stare-megatron", "pip"} & versions.keys()


def test_a_requirement_that_is_not_installed_is_not_left_out_in_silence() -> None:
    with pytest.raises(metadata.PackageNotFoundError, match="no-such-package"):
        TOOL["pins"](["no-such-package>=1"])


def test_make_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "tools/make_venv.sh", tmp_path / "venv"],
        env={"PATH": "/usr/bin:/bin", "CONSTRAINTS": "constraints/none.txt"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "make: CONSTRAINTS=constraints/none.txt is not a file; those of this repository are in tools/constraints/\n"
    )
    assert not (tmp_path / "venv").exists()
