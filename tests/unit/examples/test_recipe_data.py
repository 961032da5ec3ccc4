"""The data commands of the recipes' pages, on rows of the published form, and what the recipes make of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stare_megatron import config
from stare_megatron.__main__ import main
from stare_megatron.data.prepare.settings import INSTRUCTION
from stare_megatron.data.prompts import load_prompts
from stare_megatron.data.rows import fault
from stare_megatron.data.supervised import load_sequences
from tests import qwen_tokenizer
from tests.contracts.source import ROOT
from tests.unit.docs.commands import commands
from tests.unit.examples.recipes import RECIPES, Recipe

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
    "retool-sft": {
        "messages": [
            {"role": "user", "content": "Think, and write code.\n*user question:*\nWhat is 2^70?"},
            {
                "role": "assistant",
                "content": "I ask.\n<code>\nprint(2**70)\n</code>\n<interpreter>\n1180591620717411303424\n"
                "</interpreter>\n\\boxed{1180591620717411303424}",
            },
        ]
    },
    "gsm8k": {"question": "Ann has 3 apples and buys 4. How many has she?", "answer": "3 + 4 = 7\n#### 7"},
}
# GSM8K's page prepares its test set, then its training set without it.
SYSTEM = (ROOT / "examples/tool_use_7b/system.txt").read_text().strip()
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
        for number, written in enumerate(done):
            words = [SYSTEM if word == "$SYSTEM" else word for word in written]
            row = OTHER if "--split" in words else PUBLISHED[words[1]]
            published = folder / f"published{number}.jsonl"
            published.write_text(json.dumps(row) + "\n")
            assert main([*words, "--file", str(published)]) == 0
    assert len(done) == 13
    return folder


@dataclass(frozen=True)
class Family:
    """`asks`: what the template writes around a user's message; `default`: its system message where none is given."""

    load: Callable[[], PreTrainedTokenizerFast]
    asks: tuple[str, str]
    default: str = ""


_CHATML = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# By the beginning of a recipe's model.
FAMILIES = {
    "qwen2.5-math": Family(qwen_tokenizer.qwen2_5_math, _CHATML, INSTRUCTION),
    "qwen2.5": Family(qwen_tokenizer.load, _CHATML, _QWEN),
    "qwen3": Family(lambda: qwen_tokenizer.load("qwen3"), _CHATML),
    "r1-distill-qwen": Family(
        qwen_tokenizer.r1_distill, ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜><think>\n")
    ),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_finds_its_data_and_asks_as_its_model_s_template_does(
    recipe: Recipe, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    made = config.load(recipe.path, [])
    benchmarks = [benchmark.path for benchmark in made.eval.benchmarks]
    for path in (*made.data.train, *benchmarks):
        assert fault(path) == ""
    family = next(found for name, found in FAMILIES.items() if recipe.model.startswith(name))
    tokenizer = family.load()
    tool = recipe.file.startswith("tool_use")
    system = SYSTEM if tool else family.default
    before, after = family.asks
    for path in (*made.data.train, *benchmarks):
        row = json.loads(path.read_text())
        prompts = load_prompts(made.data.model_copy(update={"train": [path]}), tokenizer)
        assert len(prompts) == 1
        line = "" if tool else f"\n{INSTRUCTION}"
        said = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        assert tokenizer.decode(prompts.tokens) == f"{said}{before}{row['problem']}{line}{after}"


def test_the_tool_s_cold_start_is_asked_as_its_run_is(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same system message and template; learned are the policy's words and the end of its turn."""
    monkeypatch.chdir(prepared)
    warm = config.load_sft(ROOT / "examples/tool_use_7b/sft.toml", [])
    tokenizer = qwen_tokenizer.load()
    found = load_sequences("data.train", warm.data.train, warm, tokenizer)
    runs = [
        (learn, tokenizer.decode([token for _, token in run]))
        for learn, run in itertools.groupby(zip(found.learn, found.tokens, strict=True), lambda pair: bool(pair[0]))
    ]
    assert runs == [
        (False, f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{_CHATML[0]}What is 2^70?{_CHATML[1]}"),
        (True, "I ask.\n<code>\nprint(2**70)\n</code>"),
        (False, "\n<interpreter>\n1180591620717411303424\n</interpreter>\n"),
        (True, "\\boxed{1180591620717411303424}<|im_end|>"),
    ]
