"""`stare-megatron sample` on a real model of transformers, tiny and random."""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from stare_megatron.__main__ import main
from stare_megatron.chat import command
from stare_megatron.chat.policy import Policy, asks_by_template
from stare_megatron.data.tokenizer import load_tokenizer

PROMPT = "3 8 4 11 :"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} : {% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "made"
    sizes = ["--random", "--train-prompts", "8", "--eval-prompts", "8"]
    assert main(["make-tiny-model", "--out", str(out), *sizes]) == 0
    return out / "model"


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def with_template(model: Path) -> Path:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return model


def greedy(folder: Path, text: str, count: int) -> str:
    """By the argmax of the logits of the whole sequence, each time anew."""
    tokenizer = load_tokenizer(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(tokenizer(text)["input_ids"])
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[begin:], skip_special_tokens=True)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["sample", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_greedy_is_the_likeliest_token_each_time(model, capsys):
    text = said(capsys, model, PROMPT, "--temperature", 0, "--max-tokens", 12)
    assert text.rstrip("\n") == greedy(model, PROMPT, 12)
    assert text.strip()


def test_samples_differ_and_a_seed_repeats_them(model, capsys):
    arguments = (model, PROMPT, "--samples", 4, "--max-tokens", 12)
    first = said(capsys, *arguments)
    assert [line for line in first.splitlines() if line.startswith("--- ")] == [f"--- {n}" for n in (1, 2, 3, 4)]
    parts = first.split("--- ")[1:]
    assert len({part.partition("\n")[2] for part in parts}) > 1
    assert said(capsys, *arguments) == first
    assert said(capsys, *arguments, "--seed", 1) != first


def test_the_settings_of_a_checkpoint_do_not_change_what_is_sampled(model, capsys):
    before = said(capsys, model, PROMPT, "--max-tokens", 12)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 1, "repetition_penalty": 5.0}))
    assert said(capsys, model, PROMPT, "--max-tokens", 12) == before


def test_a_run_answers_as_it_was_trained(model, capsys, tmp_path):
    run = tmp_path / "runs" / "unit"
    run.mkdir(parents=True)
    shutil.copytree(with_template(model), run / "hf")
    (run / "run.json").write_text("{}")
    tokenizer = load_tokenizer(model)
    for by_template in (True, False):
        (run / "config.toml").write_text(f"[data]\nchat_template = {str(by_template).lower()}\n")
        assert asks_by_template(run, tokenizer) == asks_by_template(run / "hf", tokenizer) == by_template
    assert asks_by_template(model, tokenizer), "no run: there is a template"
    raw = said(capsys, run, "3 8 4 11", "--temperature", 0, "--max-tokens", 12)
    chat = said(capsys, run, "3 8 4 11", "--temperature", 0, "--max-tokens", 12, "--chat")
    assert raw.rstrip("\n") == greedy(model, "3 8 4 11", 12)
    assert chat.rstrip("\n") == greedy(model, "3 8 4 11 : ", 12)
    assert raw != chat


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_lines_are_prompts_and_a_conversation_is_kept(model, capsys, monkeypatch):
    asked: list[object] = []
    encode = Policy.encode

    def heard(self, prompt):
        asked.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(Policy, "encode", heard)
    typed(monkeypatch, "1 2", "", "3 4")
    said(capsys, model, "--max-tokens", 3)
    assert asked == ["1 2", "3 4"]
    asked.clear()
    typed(monkeypatch, "1 2", "3 4", "/new", "5 6")
    said(capsys, with_template(model), "--max-tokens", 3, "--system", "7 8")
    system, first = {"role": "system", "content": "7 8"}, {"role": "user", "content": "1 2"}
    assert asked[0] == [system, first]
    assert isinstance(asked[1], list)
    assert [m["role"] for m in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][1] == first
    assert asked[2] == [system, {"role": "user", "content": "5 6"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}x", "a"], "no such folder"),
        (["{model}", PROMPT, "--samples", "0"], "--samples 0: at least 1"),
        (["{model}", PROMPT, "--temperature", "-1"], "--temperature -1"),
        (["{model}", PROMPT, "--top-p", "0"], "--top-p 0"),
        (["{model}", PROMPT, "--chat"], "no chat template; --raw gives"),
        (["{model}", PROMPT, "--system", "be brief"], "add --chat"),
        (["{model}", "1 " * 4000], "the model's window"),
    ],
)
def test_what_is_wrong_is_one_line(model, capsys, arguments, words):
    assert main(["sample", *(part.format(model=model) for part in arguments)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_policy_that_was_converted_for_this_once_goes_when_the_terminal_is_closed(model, monkeypatch, number):
    removed = []

    @contextlib.contextmanager
    def converted(policy: Path, say: Callable[[str], None]) -> Iterator[Path]:
        try:
            yield policy
        finally:
            removed.append(policy)

    monkeypatch.setattr(command, "hf_folder", converted)
    monkeypatch.setattr(command, "Policy", lambda *_: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert main(["sample", str(model), PROMPT]) == 130
    finally:
        signal.signal(number, before)
    assert removed == [model]
