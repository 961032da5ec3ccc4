"""The examples of docs/adding_a_metric.md, applied to a copy of the package, give metrics."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json
from pathlib import Path
from tests.unit.run.test_step_metrics import random_step
from tests.unit.trainer.passes import N, run_pass, tokens
import stare_megatron
from stare_megatron.metrics.catalogue import by_name
from stare_megatron.metrics.reduce import reduce

passed = by_name(reduce(run_pass("cispo", {}, [list(range(N // 2)), [], list(range(N // 2, N))]).measured))
step = random_step(0)
print(json.dumps({
    "package": str(Path(stare_megatron.__file__).parents[1]),
    "passed": {name: passed[name] for name in ("update/ratio_above", "loss/importance")},
    "above": float(((tokens()["new"] - tokens()["old"]).exp() > 1.1).double().mean()),
    "step": {name: step.metrics()[name] for name in ("throughput/trained_fraction", "response/length_correct")},
    "lengths": [n for g, _ in step.groups for n, c in zip(g.num_action_tokens, g.correct) if c],
    "sampled": sum(n for g, _ in step.groups for n in g.num_action_tokens),
}))
"""


def apply(page: str, root: Path) -> list[str]:
    """Every ```diff of the page, each of one file; returns what was changed."""
    changed = []
    for name, body in re.findall(r"```diff\n--- (\S+)\n(.*?)```", page, re.DOTALL):
        lines = body.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        text = (root / name).read_text()
        assert text.count(old) == 1, f"{name} has no longer, or more than once:\n{old}"
        (root / name).write_text(text.replace(old, new))
        changed.append(name)
    return changed


@pytest.mark.parts
def test_the_examples_of_the_guide_work(tmp_path):
    shutil.copytree(ROOT / "stare_megatron", tmp_path / "stare_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    changed = apply((ROOT / "docs" / "adding_a_metric.md").read_text(), tmp_path)
    assert changed.count("stare_megatron/metrics/catalogue.py") == 4
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = programs.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["package"] == str(tmp_path)
    assert seen["passed"]["update/ratio_above"] == seen["above"] > 0
    assert 0.8 < seen["passed"]["loss/importance"] < 1.28
    assert seen["step"]["response/length_correct"] == sum(seen["lengths"]) / len(seen["lengths"])
    assert seen["step"]["throughput/trained_fraction"] == 210 / seen["sampled"]
