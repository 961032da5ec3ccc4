"""Every recipe's model is built by Megatron-Core at its layout, and has the parameters that the plan counts."""

from __future__ import annotations

import json
import os
import sys

import pytest

from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.parameters import Layout, held
from tests import programs
from tests.contracts.source import ROOT
from tests.unit.examples.recipes import RECIPES


@pytest.mark.parts
def test_a_rank_of_each_recipe_is_what_the_plan_says() -> None:
    command = [sys.executable, "-m", "tests.unit.examples.recipe_shapes"]
    done = programs.run(command, cwd=ROOT, env=os.environ | {"STARE_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout.splitlines()[-1])
    for recipe in RECIPES:
        made = recipe.load()
        layout = Layout.of(made.trainer)
        assert built[recipe.file] == held(read_hf_config(made.model.path), layout, 0).parameters, recipe.file
