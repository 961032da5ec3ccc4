"""Every recipe's model is built by Megatron-Core at its layout, and has the parameters that the plan counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.parameters import Layout, held
from tests.contracts.source import ROOT
from tests.unit.examples.recipes import RECIPES


def test_a_rank_of_each_recipe_is_what_the_plan_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.examples.recipe_shapes"],
        cwd=ROOT,
        env=os.environ | {"STARE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout.splitlines()[-1])
    for recipe in RECIPES:
        made = recipe.load()
        layout = Layout.of(made.trainer)
        assert built[recipe.file] == held(read_hf_config(made.model.path), layout, 0).parameters, recipe.file
