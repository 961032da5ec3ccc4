"""The page of the Python API, run as it is written: training, evaluating and reading in a process of its own."""

from __future__ import annotations

import re
import sys

import pytest

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs
from tests.contracts.source import ROOT


@pytest.mark.runs
def test_the_page_runs(tmp_path):
    make(default_settings("order_free_sum", layers=2, seed=3), tmp_path / ".cache/demo", 512, 32)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/python_api.md").read_text(), re.DOTALL))
    script = tmp_path / "page.py"
    # Ray's workers import the script's module by its file when they unpickle: nothing may run there.
    script.write_text("def page():\n" + "\n".join(f"    {line}" for line in code.splitlines()) + "\n\n\n")
    with script.open("a") as f:
        f.write('if __name__ == "__main__":\n    page()\n')
    done = programs.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout
    assert "from-python True" in said
    assert re.search(r"mean reward 0\.\d+ at step 1, 0\.\d+ at step 3", said)
    assert len(re.findall(r"^[123] 0\.\d+$", said, re.MULTILINE)) == 3
    assert "unknown key 'run.stepz'; did you mean 'run.steps'?" in said


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)
