"""The images of tools/docker: pinned, not root, and what `launch` and KubeRay expect of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from stare_megatron.launch import k8s, slurm

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "tools/docker").glob("Dockerfile.?pu"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def final(file: Path) -> str:
    """What the image that is run is made of."""
    return file.read_text().rpartition("\nFROM ")[2]


def test_both_are_there() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@each
def test_bases_are_pinned(file: Path) -> None:
    bases = re.findall(r"^FROM (\S+)", file.read_text(), re.MULTILINE)
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)


@each
def test_the_user_is_not_root_and_the_one_of_the_pods(file: Path) -> None:
    last = re.findall(r"^USER (\d+):(\d+)$", final(file), re.MULTILINE)[-1]
    assert last == (str(k8s.USER), str(k8s.USER))
    assert f"useradd --uid {k8s.USER} " in final(file)
    assert final(file).index("useradd") < final(file).index("USER")


@each
def test_the_interpreter_is_where_jobs_look_for_it(file: Path) -> None:
    folder = slurm.IMAGE_PYTHON.rpartition("/")[0]
    assert f"ENV PATH={folder}:$PATH" in final(file)
    assert f"venv {folder.rpartition('/')[0]}" in file.read_text()


@each
def test_what_a_ray_job_needs_is_in_it(file: Path) -> None:
    """The dashboard, and what KubeRay's probes call."""
    kind = file.suffix.removeprefix(".")
    [extras] = re.findall(r"/opt/stare_megatron\[([\w,]+)\]", file.read_text())
    assert set(extras.split(",")) == {kind, "cluster"} <= EXTRAS.keys()
    assert re.search(r"install .*\bwget\b", final(file))


@each
def test_nothing_of_the_checkout_s_own_goes_along(file: Path) -> None:
    left_out = file.with_name(f"{file.name}.dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(left_out)
