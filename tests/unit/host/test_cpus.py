"""CPUs of a process by affinity and by the quota of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stare_megatron.host import cpus


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def files(folder: Path, groups: str, **contents: str) -> tuple[Path, Path]:
    (folder / "cgroup").write_text(groups)
    root = folder / "fs"
    for name, text in contents.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "cgroup", root


def write(folder: Path, groups: str, contents: dict[str, str]) -> int:
    return cpus.usable(*files(folder, groups, **contents))


def test_without_a_quota_those_it_is_bound_to(tmp_path: Path) -> None:
    assert cpus.usable(tmp_path / "none", tmp_path) == 16
    assert write(tmp_path, "0::/job\n", {"job/cpu.max": "max 100000\n"}) == 16


def test_the_least_quota_of_a_group_and_those_it_is_in(tmp_path: Path) -> None:
    assert (
        write(tmp_path, "0::/slice/job\n", {"slice/job/cpu.max": "800000 100000", "slice/cpu.max": "350000 100000"})
        == 4
    )


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """Its path is the host's, which is not mounted."""
    assert write(tmp_path, "0::/docker/abc\n", {"cpu.max": "150000 100000"}) == 2


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    groups = "5:memory:/job\n4:cpu,cpuacct:/job\n"
    found = {"cpu,cpuacct/job/cpu.cfs_quota_us": "600000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}
    assert write(tmp_path, groups, found) == 6
    assert write(tmp_path, groups, found | {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n"}) == 16


def test_a_process_that_is_bound_to_one() -> None:
    """A real one; the quota of where this runs may not raise it."""
    code = (
        "import os; from stare_megatron.host import cpus; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(cpus.usable())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
