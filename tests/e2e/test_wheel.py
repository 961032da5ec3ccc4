"""What is installed without a checkout: the wheel alone makes a model and knows its docs and examples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.contracts.source import ROOT

SOURCES = ("stare_megatron", "patches", "docs", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_the_wheel_suffices(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():  # others that run may be writing their caches
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, timeout=1500, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(source)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    code = (
        "import stare_megatron, pathlib, contextlib, io\n"
        "from stare_megatron.__main__ import main\n"
        "print(stare_megatron.__file__)\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "    assert main(['example', 'demo_cpu/run.toml']) == 0\n"
        "pathlib.Path('demo.toml').write_text(text.getvalue())\n"
        "sizes = ['--random', '--train-prompts', '64', '--eval-prompts', '8']\n"
        "assert main(['make-tiny-model', '--out', '.cache/demo', *sizes]) == 0\n"
        "assert main(['train', 'demo.toml', '--print-config']) == main(['methods']) == main(['docs']) == 0\n"
        "assert main(['docs', 'checkpoints']) == 0\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")), "the checkout was imported instead"
    assert "LOG" not in done.stdout.splitlines()
    assert done.stdout.endswith((ROOT / "docs/checkpoints.md").read_text())
    assert (tmp_path / ".cache/demo/model/model.safetensors").is_file()
