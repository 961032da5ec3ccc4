"""The cold start of examples/tool_use_cpu: what its worked answers teach, and that its commands fit each other."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from stare_megatron import config, tasks
from stare_megatron.data.supervised import load_sequences
from stare_megatron.tasks.tiny_model import make_tokenizer
from tests.contracts.source import ROOT
from tests.unit.docs.commands import commands

FOLDER = ROOT / "examples/tool_use_cpu"
COUNT = 200


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("worked") / "new" / "worked.jsonl"
    script = runpy.run_path(str(FOLDER / "make_worked.py"))
    assert script["main"](["--out", str(file), "--count", str(COUNT), "--prompts", "64"]) == 0
    return file


def test_answers_are_right_and_the_interpreter_s_words_are_not_learned(worked: Path) -> None:
    task = tasks.get("tool_arithmetic")
    assert task.tool is not None
    prompts = {p.text: p.answer for p in task.prompts("train", 64, 1)}
    calls = 0
    for line in worked.read_text().splitlines():
        row = json.loads(line)
        said = "".join(part["text"] for part in row["parts"] if part["learn"])
        assert task.verify(row["prompt"], prompts[row["prompt"]], said).correct
        for call, answer in zip(row["parts"], row["parts"][1:], strict=False):
            if not answer["learn"]:
                calls += 1
                assert answer["text"] == task.tool.answer(call["text"])
    assert 0.55 * COUNT < calls < 0.85 * COUNT  # the rest do without


def test_sft_reads_them_as_a_policy_would_see_them(worked: Path) -> None:
    run = config.load_sft(FOLDER / "sft.toml", [f"data.train={worked}"])
    task = tasks.get("tool_arithmetic")
    tokenizer = make_tokenizer(task)
    found = load_sequences("data.train", run.data.train, run, tokenizer)
    assert (len(found), found.counts.truncated, found.counts.dropped) == (COUNT, 0, 0)
    row = json.loads(worked.read_text().splitlines()[0])
    ids = tokenizer.encode(row["prompt"])
    learn = [False] * len(ids)
    for part in row["parts"]:
        more = tokenizer.encode(part["text"], add_special_tokens=False)
        ids, learn = [*ids, *more], [*learn, *[part["learn"]] * len(more)]
    group = found.group(0)
    (trajectory,) = group.trajectories
    assert [token for span in trajectory.spans for token in span.token_ids.tolist()] == [*ids, tokenizer.eos_token_id]
    assert trajectory.num_action_tokens == sum(learn) + 1


def test_the_commands_make_what_the_next_ones_read() -> None:
    """`--out` of the first two, and the run's folder of `sft`."""
    mine = [c.words for c in commands() if c.page == "examples/tool_use_cpu/README.md"]
    (make,) = [words for words in mine if "--random" in words]
    (generator,) = [words for words in mine if "examples/tool_use_cpu/make_worked.py" in words]
    (train,) = [words for words in mine if "run.name=tool_use_cold" in words]
    warm = config.load_sft(FOLDER / "sft.toml", [])
    out = Path(make[make.index("--out") + 1])
    assert warm.model.path == (out / "model").absolute()
    assert warm.data.train == [Path(generator[generator.index("--out") + 1]).absolute()]
    run = config.load(FOLDER / "run.toml", list(train[3:]))
    assert run.model.path == warm.folder / "hf"
    assert run.data.train == [(out / "train.jsonl").absolute()]
    assert run.eval.benchmarks[0].path == (out / "test.jsonl").absolute()
