"""Examples as `stare-megatron example` prints them: usable wherever they are saved."""

from __future__ import annotations

import pytest

from stare_megatron import config
from stare_megatron.host.shipped import shipped
from tests.unit.examples.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_an_example_that_includes_others_can_be_saved_anywhere(tmp_path, recipe):
    file = tmp_path / "mine.toml"
    file.write_text(shipped("examples", recipe.file))
    assert config.load(file, []) == config.load(recipe.path, [])


def test_other_text_is_as_it_is():
    assert 'include = "../base/long_cot.toml"' in shipped("docs", "configuration")
