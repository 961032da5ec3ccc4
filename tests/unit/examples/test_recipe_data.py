"""The data commands of the recipes' pages, on rows of the published form, and what the recipes make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import config
from stare_megatron.__main__ import main
from stare_megatron.data.prepare.settings import INSTRUCTION
from stare_megatron.data.prompts import load_prompts
from stare_megatron.data.rows import fault
from tests import qwen_tokenizer
from tests.unit.docs.commands import commands
from tests.unit.examples.recipes import RECIPES

SOLVED = "How many ways are there to put five different letters into three boxes, if a box may stay empty?"
# Rows as the publishers have them, of a problem of the data set's own.
PUBLISHED: dict[str, dict[str, Any]] = {
    "aime24": {"id": 1, "problem": f"{SOLVED} (A)", "solution": "It is 243.", "answer": "243"},
    "aime25": {"id": "0", "problem": f"{SOLVED} (B)", "answer": "243"},
    "amc23": {"id": 1, "question": f"{SOLVED} (C)", "answer": "243"},
    "math-500": {"unique_id": "a", "problem": f"{SOLVED} (D)", "answer": "3^5"},
    "minerva": {"question": f"{SOLVED} (E)", "answer": "243"},
    "olympiadbench": {"id": 1, "question": f"{SOLVED} (F)", "final_answer": ["243"]},
    "dapo-math-17k": {
        "prompt": [{"role": "user", "content": "What is the sum of the first hundred odd numbers?"}],
        "reward_model": {"ground_truth": "10000", "style": "rule"},
        "extra_info": {"index": "a"},
    },
    "gsm8k": {"question": "Ann has 3 apples and buys 4. How many has she?", "answer": "3 + 4 = 7\n#### 7"},
}
# GSM8K's page prepares its test set, then its training set without it.
OTHER = {"question": "Ben reads 12 pages a day. How many in a week?", "answer": "12 x 7 = 84\n#### 84"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every data command of the pages has run."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pages = [c for c in commands() if c.page.startswith("examples/") and "gsm8k_cpu" not in c.page]
        done = [c.words[1:] for c in pages if c.words[1] == "prepare-data"]
        for number, words in enumerate(done):
            row = OTHER if "--split" in words else PUBLISHED[words[1]]
            published = folder / f"published{number}.jsonl"
            published.write_text(json.dumps(row) + "\n")
            assert main([*words, "--file", str(published)]) == 0
    assert len(done) == 9
    return folder


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.file.startswith("tool_use")], ids=str)
def test_a_recipe_finds_its_data_and_asks_as_the_model_s_template_does(
    recipe, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Qwen2.5's own tokenizer and template; what other families' templates write is not looked at."""
    monkeypatch.chdir(prepared)
    made = config.load(recipe.path, [])
    for path in (*made.data.train, *(benchmark.path for benchmark in made.eval.benchmarks)):
        assert fault(path) == ""
    tokenizer = qwen_tokenizer.load()
    prompts = load_prompts(made.data, tokenizer)
    assert len(prompts) == 1
    asked = tokenizer.decode(prompts.tokens)
    assert asked.startswith("<|im_start|>system\n")
    assert asked.endswith("<|im_start|>assistant\n")
    assert asked.count(INSTRUCTION) == 1
    assert asked.count("<|im_start|>user\n") == 1
