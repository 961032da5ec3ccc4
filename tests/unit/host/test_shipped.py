"""Examples as `stare-megatron example` prints them: usable wherever they are saved."""

from __future__ import annotations

import pytest

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.host.shipped import shipped
from tests.unit.examples.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_an_example_that_includes_others_can_be_saved_anywhere(tmp_path, recipe):
    file = tmp_path / "mine.toml"
    file.write_text(shipped("examples", recipe.file))
    assert config.load(file, []) == config.load(recipe.path, [])


@pytest.mark.parametrize(
    ("folder", "name", "answer"),
    [
        ("examples", "demo", "no 'demo' in examples; there is demo_cpu/README, demo_cpu/run.toml"),
        ("examples", "demo_cpu", "no 'demo_cpu' in examples; there is demo_cpu/README, demo_cpu/run.toml"),
        ("examples", "demo_cpu/run.tml", "no 'demo_cpu/run.tml' in examples; did you mean 'demo_cpu/run.toml'?"),
        ("docs", "Pushes", "no 'Pushes' in docs; did you mean 'weight_pushes'?"),
        ("docs", "planing", "no 'planing' in docs; did you mean 'planning'?"),
        ("docs", "qqqq", "no 'qqqq' in docs; without a name they are listed"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_what_is_near(folder, name, answer):
    with pytest.raises(UserError) as refused:
        shipped(folder, name)
    assert str(refused.value) == answer


def test_other_text_is_as_it_is():
    assert 'include = "../base/long_cot.toml"' in shipped("docs", "configuration")
