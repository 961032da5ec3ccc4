"""`data.chat_template_kwargs`: variables of a chat template, in every place that writes by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import config
from stare_megatron.chat.policy import template_variables
from stare_megatron.config import DataConfig
from stare_megatron.config.env import ToolUseConfig
from stare_megatron.data.prompts import load_prompts
from stare_megatron.data.supervised import load_sequences
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.envs.parsers import make_parser
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml
from tests import qwen_tokenizer
from tests.configs import configuration

UNTHINKING = "<think>\n\n</think>\n\n"
OFF = {"enable_thinking": False}


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A folder with Qwen3's chat template and special tokens; of its vocabulary the bytes alone, so that it loads at
    once."""
    folder = Path(shutil.copytree(qwen_tokenizer.fetched("qwen3"), tmp_path / "qwen3"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["vocab"] = {byte: i for byte, i in tree["model"]["vocab"].items() if i < 256}
    tree["model"]["merges"] = []
    for i, token in enumerate(tree["added_tokens"]):
        token["id"] = 256 + i
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (end,) = (token["id"] for token in tree["added_tokens"] if token["content"] == "<|im_end|>")
    shape = {"model_type": "qwen3", "vocab_size": 256 + len(tree["added_tokens"]), "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def asked(tmp_path: Path, model: Path, variables: dict[str, Any]) -> str:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}))
    data = DataConfig(train=[file], chat_template_kwargs=variables)
    tokenizer = load_tokenizer(model, data.chat_template_kwargs)
    return str(tokenizer.decode(load_prompts(data, tokenizer).tokens))


def test_the_template_finds_them_set(tmp_path: Path, qwen3: Path) -> None:
    plain = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert asked(tmp_path, qwen3, {}) == plain
    assert asked(tmp_path, qwen3, {"enable_thinking": True}) == plain
    assert asked(tmp_path, qwen3, OFF) == plain + UNTHINKING


def test_a_tool_s_answer_is_followed_by_what_a_prompt_ends_with(qwen3: Path) -> None:
    tokenizer = load_tokenizer(qwen3, OFF)
    written = make_parser(ToolUseConfig(parser="hermes"), tokenizer).render("", [[1]], ended=False)
    assert written is not None
    assert str(tokenizer.decode(written)).endswith(f"<|im_start|>assistant\n{UNTHINKING}")


def test_conversations_of_sft_are_written_with_them(tmp_path: Path, qwen3: Path) -> None:
    file = tmp_path / "c.jsonl"
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    file.write_text(json.dumps({"messages": talk}))
    tree = {
        "model": {"path": str(qwen3)},
        "data": {"train": [str(file)], "chat_template_kwargs": OFF},
        "run": {"name": "r"},
    }
    run = config.parse_sft(tree, "test")
    tokenizer = load_tokenizer(qwen3, run.data.chat_template_kwargs)
    found = load_sequences("data.train", [file], run, tokenizer)
    assert f"<|im_start|>assistant\n{UNTHINKING}4<|im_end|>" in str(tokenizer.decode(found.tokens))


def test_a_trained_policy_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    run = configuration(data={"chat_template_kwargs": OFF | {"style": 'a "quoted" one', "level": 2}})
    (tmp_path / "config.toml").write_text(to_toml(run))
    assert template_variables(tmp_path / "hf") == {"enable_thinking": False, "style": 'a "quoted" one', "level": 2}
    assert template_variables(tmp_path.parent / "elsewhere/hf") == {}


def test_texts_arrive_as_they_are(tmp_path: Path, qwen3: Path) -> None:
    tree = json.loads((qwen3 / "tokenizer_config.json").read_text())
    tree["chat_template"] = "\n{{ style }}|{{ level + 1 }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(tree))
    assert asked(tmp_path, qwen3, {"style": "a \"b\" 'c' \\n é {{ x }}", "level": 2}) == (
        "\na \"b\" 'c' \\n é {{ x }}|3|2 + 2?"
    )


def test_on_the_command_line_each_is_a_key(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[run]\nname = "r"\nsteps = 1\n[reward]\nname = "math"\n[model]\npath = "m"\n[data]\ntrain = ["t.jsonl"]\n'
    )
    made = config.load(file, ["data.chat_template_kwargs.enable_thinking=false"])
    assert made.data.chat_template_kwargs == OFF


def test_what_no_template_reads_is_refused(tmp_path: Path, qwen3: Path) -> None:
    with pytest.raises(UserError, match="'enable_thinkng', which the chat template does not name; take it out"):
        load_tokenizer(qwen3, {"enable_thinkng": False})
    tree = json.loads((qwen3 / "tokenizer_config.json").read_text())
    tree.pop("chat_template")
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="the tokenizer has no chat template; leave it out"):
        load_tokenizer(qwen3, OFF)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"messages": "x"}, "'messages' is no variable that can be given"),
        ({"eos_token": "x"}, "'eos_token' is no variable"),
        ({"a b": 1}, "'a b' is no variable"),
        ({"style": ["x"]}, r"style = \['x'\]; want true, false, a text or a finite number"),
        ({"style": float("inf")}, "style = inf; want"),
    ],
)
def test_what_cannot_be_given_is_refused(variables: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"data.chat_template_kwargs.*{says}"):
        configuration(data={"chat_template_kwargs": variables})
