"""The stand-ins of examples/gsm8k_cpu are in GSM8K's published form, and fit the commands of its page."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.__main__ import main
from stare_megatron.config.loader import load_sft
from stare_megatron.data.prompts import load_prompts
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.models.families import read_hf_config
from tests.unit.docs.commands import commands

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples/gsm8k_cpu"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands before `sft` have run."""
    folder = tmp_path_factory.mktemp("gsm8k_cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script = runpy.run_path(str(FOLDER / "make_small.py"))
        assert script["main"](["--out", ".cache/gsm8k_cpu"]) == 0
        pages = [c.words[1:] for c in commands() if c.page == "examples/gsm8k_cpu/README.md"]
        local = [words for words in pages if words[0] == "prepare-data" and "--file" in words]
        assert len(local) == 2
        for words in local:
            assert main(words) == 0
    return folder


def test_rows_are_prepared_and_none_is_in_both_files(made: Path) -> None:
    train, held = (
        [json.loads(line) for line in (made / f".cache/gsm8k_cpu/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    assert (len(train), len(held)) == (1024, 64)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert all(row["answer"].isdigit() for row in (*train, *held))


def test_prompts_of_training_are_those_of_the_worked_answers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what `sft` teaches is what `train` asks for; half of the answers are right."""
    monkeypatch.chdir(made)
    run = config.load(FOLDER / "run.toml", [])
    asked = load_prompts(run.data, load_tokenizer(made / ".cache/gsm8k_cpu/model"))
    assert len(asked) == 1024
    rows = [json.loads(line) for line in (made / ".cache/gsm8k_cpu/worked.jsonl").read_text().splitlines()]
    train = {
        json.loads(line)["prompt"]: json.loads(line)["answer"] for line in run.data.train[0].read_text().splitlines()
    }
    right = [row["completion"].endswith(f"\\boxed{{{train[row['prompt']]}}}") for row in rows]
    assert 0.45 < sum(right) / len(right) < 0.55


def test_the_model_is_one_that_both_commands_take(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    warm = load_sft(FOLDER / "sft.toml", [])
    assert read_hf_config(warm.model.path).vocab == 258
    assert config.load(FOLDER / "run.toml", []).model.path == warm.run.dir / warm.run.name / "hf"
