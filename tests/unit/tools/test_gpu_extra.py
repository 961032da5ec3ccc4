"""The extra `gpu`: one set of versions wherever they are named, and what a resolver makes of it today."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GPU: list[str] = PROJECT["optional-dependencies"]["gpu"]


def asked(package: str) -> str:
    """What pyproject.toml asks of a package: in the extra, or of everybody."""
    (found,) = [r for r in [*GPU, *PROJECT["dependencies"]] if re.split(r"[\[=<>!; ]", r)[0] == package]
    return found


def allows(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version)


def named(text: str, package: str) -> set[str]:
    """Versions that a script pins a package to."""
    return set(re.findall(rf"(?<![\w-]){re.escape(package)}==([\w.]+)", text))


FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        TOOLS / "docker/Dockerfile.gpu",
        TOOLS / "build_te.sh",
        TOOLS / "make_te_venv.sh",
        TOOLS / "offline_gpu.txt",
        TOOLS / "offline_te.txt",
        ROOT / "docs/gpu.md",
    ]
}
PINS = [
    (file, package, version)
    for file, text in FILES.items()
    for package in ("torch", "vllm", "megatron-core", "ray", "math-verify", "pydantic")
    for version in sorted(named(text, package))
]


def test_pins_were_found():
    assert {"tools/docker/Dockerfile.gpu", "tools/make_te_venv.sh", "tools/offline_gpu.txt", "docs/gpu.md"} <= {
        file for file, _, _ in PINS
    }


@pytest.mark.parametrize(("file", "package", "version"), PINS, ids=str)
def test_pins_are_what_pyproject_allows(file, package, version):
    assert allows(asked(package), version)


def test_one_version_of_transformer_engine():
    packages = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    found = {version for text in FILES.values() for package in packages for version in named(text, package)}
    assert len(found) == 1, found
    assert allows(asked("transformer-engine"), *found)


def test_the_image_takes_python_and_cuda_of_the_wheels():
    """torch 2.13 is built for CUDA 13.0; Megatron-Core 0.19 wants Python 3.12."""
    images = re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)", FILES["tools/docker/Dockerfile.gpu"], re.MULTILINE)
    assert set(images) == {"13.0"}
    assert set(re.findall(r"python(3\.\d+)", FILES["tools/docker/Dockerfile.gpu"])) == {"3.12"}


def test_torch_comes_before_the_extension_and_that_before_the_rest():
    text = FILES["tools/docker/Dockerfile.gpu"]
    assert text.index('pip install "torch') < text.index("build_te.sh python") < text.index("[gpu,")
    assert "--no-build-isolation" in FILES["tools/build_te.sh"]


@cache
def python312() -> str:
    """A Python 3.12 that has pip, or ""."""
    for name in ("python3.12", "python3"):
        path = shutil.which(name)
        check = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))"
        if path and subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    return ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_a_resolver_finds(tmp_path):
    """Needs the network. Nothing is installed; metadata of the extension's source package is made with this Python.

    Only wheels would not do: the extension has none, so that `--only-binary=:all:` finds no answer."""
    if not python312():
        pytest.skip("no Python 3.12 with pip")
    report = tmp_path / "report.json"
    wanted = [*PROJECT["dependencies"], *GPU]
    command = [
        python312(),
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        str(report),
    ]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        one["metadata"]["name"].lower().replace("_", "-"): one["metadata"]["version"]
        for one in json.loads(report.read_text())["install"]
    }
    assert found["torch"] == "2.13.0"
    for requirement in wanted:
        package = re.split(r"[\[=<>!; ]", requirement)[0].lower().replace("_", "-")
        assert allows(requirement, found[package]), requirement
    # The Dockerfile builds the extension of the version that the resolver then meets; another would be built again.
    (pinned,) = named(FILES["tools/build_te.sh"], "transformer-engine-torch")
    assert found["transformer-engine-torch"] == pinned
    assert found["transformer-engine-cu13"] == pinned
