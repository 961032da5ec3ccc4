"""Commands that are printed work as they are typed, with the environment activated or not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stare_megatron.host import program
from tests.contracts.source import ROOT

SYSTEM = "/usr/bin:/bin"


def environment(folder: Path) -> Path:
    """A folder `bin` with an interpreter and the program."""
    (folder / "bin").mkdir(parents=True)
    for name in ("python", program.NAME):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `bin` of an environment in the current directory, not on PATH."""
    made = environment(tmp_path / "my clone/.venv")
    monkeypatch.chdir(tmp_path / "my clone")
    monkeypatch.setenv("PATH", SYSTEM)
    monkeypatch.setattr(sys, "executable", str(made / "python"))
    return made


def test_an_environment_that_is_not_activated_is_named_by_its_path(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert program.called() == ".venv/bin/stare-megatron"
    monkeypatch.chdir(here)
    assert program.called() == "./stare-megatron"
    monkeypatch.chdir(tmp_path.parent)
    assert program.called() == f"'{here}/stare-megatron'".replace(f"'{tmp_path.parent}/", "'")
    monkeypatch.chdir("/usr")
    assert program.called() == f"'{here}/stare-megatron'"


def test_an_activated_one_by_the_name_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{here}:{SYSTEM}")
    assert program.called() == "stare-megatron"


def test_the_program_of_another_environment_on_the_path_is_not_this_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{environment(tmp_path / 'other')}:{SYSTEM}")
    assert program.called() == ".venv/bin/stare-megatron"


def test_without_the_script_the_interpreter_runs_it(here: Path) -> None:
    (here / program.NAME).unlink()
    assert program.called() == f"'{here}/python' -m stare_megatron"


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=str)
def test_what_it_says_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", SYSTEM)
    done = subprocess.run(f"{program.called()} methods", shell=True, capture_output=True, text=True, check=True)
    assert "grpo" in done.stdout


def test_ctrl_c_while_python_ends_says_nothing():
    """Its own answer would be a traceback below what the command has said."""
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started the tests may ignore it
        "from stare_megatron.__main__ import main\n"
        "sys.argv = ['stare-megatron', 'methods']\n"
        "assert main() == 0\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert "stare" in done.stdout
