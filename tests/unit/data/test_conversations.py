"""What is learned of a row: with tokenizers and chat templates of published models, and with small ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.config import parse_sft
from stare_megatron.data.prepare.retool import conversation
from stare_megatron.data.prepare.types import RawRow
from stare_megatron.data.supervised import SequenceSet, load_sequences
from stare_megatron.errors import UserError
from stare_megatron.types import SpanKind
from tests import qwen_tokenizer

PUBLISHED = ("qwen2_5", "llama3_1", "deepseek_v3", "gemma3")
END = {
    "qwen2_5": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
}
TALK = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "It is 7.\n\nNothing else."},
    {"role": "user", "content": "And 7 + 1, ünsure?"},
    {"role": "assistant", "content": "8 "},
]


def load(tmp_path: Path, tokenizer: Any, *rows: dict[str, Any], sft: Any = None, **data: Any) -> SequenceSet:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"model": {"path": "m"}, "data": {"train": [str(file)]} | data, "sft": sft or {}}
    return load_sequences("data.train", [file], parse_sft(tree, "test"), tokenizer)


def runs(sequences: SequenceSet, tokenizer: Any, index: int = 0) -> list[tuple[bool, str]]:
    """Text of the stretches that are learned and that are not."""
    place = sequences.place(index)
    pairs = zip(sequences.learn[place].tolist(), sequences.tokens[place].tolist(), strict=True)
    return [
        (learn, tokenizer.decode([token for _, token in own]))
        for learn, own in itertools.groupby(pairs, lambda p: p[0])
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_assistants_turns_and_their_ends_are_learned(name: str, tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load(name)
    found = runs(load(tmp_path, tokenizer, {"messages": TALK}), tokenizer)
    told = [text for learn, text in found if learn]
    said = [m["content"] for m in TALK if m["role"] == "assistant"]
    # Llama's and Gemma's templates take white space off a message.
    assert [text.removesuffix(END[name]).strip() for text in told] == [text.strip() for text in said]
    assert all(text.endswith(END[name]) for text in told)
    assert [learn for learn, _ in found][:4] == [False, True, False, True]
    asked = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert "".join(text for _, text in found[:3]) == asked
    assert not found[4:] or found[4:] == [(False, "\n")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokens_are_those_of_the_whole_conversation(name: str, tmp_path: Path) -> None:
    """Of these messages, at whose bounds no token would join two pieces."""
    tokenizer = qwen_tokenizer.load(name)
    found = load(tmp_path, tokenizer, {"messages": TALK})
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    want = tokenizer(whole.rstrip(), add_special_tokens=False)["input_ids"]
    assert found.tokens.tolist()[: len(want)] == want
    assert len(found.tokens) == len(want)


def test_marks_are_those_of_a_template_with_generation_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own mask, of Qwen2.5's template with the assistant's text between generation tags."""
    tokenizer = qwen_tokenizer.load()
    head = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    body = "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    tail = "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", head + body + tail + ask)
    marked: Any = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    found = load(tmp_path, tokenizer, {"messages": TALK})
    ids, mask = (list(marked[key]) for key in ("input_ids", "assistant_masks"))
    assert found.tokens.tolist() == ids[:-1]  # the last is the "\n" after the end
    assert found.learn.tolist() == [bool(m) for m in mask[:-1]]


def test_where_earlier_thoughts_are_left_out_each_answer_is_a_sequence(tmp_path: Path) -> None:
    """Qwen3's template writes a thought in the last turn only, as its engines then see it."""
    tokenizer = qwen_tokenizer.load("qwen3")
    thought = [
        {**m, "content": f"<think>\nHm {i}.\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for i, m in enumerate(TALK)
    ]
    found = load(tmp_path, tokenizer, {"messages": thought})
    assert len(found) == 2
    assert found.counts.split == 1
    assert [text for learn, text in runs(found, tokenizer, 0) if learn] == [f"{thought[1]['content']}<|im_end|>"]
    second = runs(found, tokenizer, 1)
    assert "Hm" not in second[0][1]
    assert second[1][1] == f"{thought[3]['content']}<|im_end|>"


def test_tool_turns_are_not_learned(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "SECRET 7"},
        {"role": "assistant", "content": "7"},
    ]
    found = runs(load(tmp_path, tokenizer, {"messages": talk}), tokenizer)
    told = [text for learn, text in found if learn]
    assert len(told) == 2
    assert '"name": "add"' in told[0]
    assert told[1] == "7<|im_end|>"
    assert "SECRET" in "".join(text for learn, text in found if not learn)


def test_retools_conversations_learn_all_but_the_interpreters_words(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    answer = (
        "Let me see.\n<code>\n```python\nprint(2 ** 70)\n```\n</code>\n<interpreter>\n1180591620717411303424\n"
        "</interpreter>\nSo it is.\n<answer>\\boxed{1}</answer>"
    )
    messages = [{"role": "user", "content": "Rules\n*user question:*\n2^70?"}, {"role": "assistant", "content": answer}]
    row = conversation(RawRow("f:1", {"messages": messages}), "Be brief.")
    found = runs(load(tmp_path, tokenizer, row), tokenizer)
    assert [text for learn, text in found if learn] == [
        "Let me see.\n<code>\n```python\nprint(2 ** 70)\n```\n</code>",
        "So it is.\n\n\\boxed{1}<|im_end|>",
    ]
    assert found[2] == (False, "\n<interpreter>\n1180591620717411303424\n</interpreter>\n")


def test_a_completion_and_its_end_are_learned(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    rows = ({"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 + 1 =", "completion": " 2<|im_end|>"})
    found = load(tmp_path, tokenizer, *rows)
    for i in range(2):
        assert runs(found, tokenizer, i) == [(False, "1 + 1 ="), (True, " 2<|im_end|>")]


def test_a_completion_in_parts(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    parts = [{"text": "call", "learn": True}, {"text": " out", "learn": False}, {"text": " done", "learn": True}]
    found = runs(load(tmp_path, tokenizer, {"prompt": "Q", "parts": parts}), tokenizer)
    assert found == [(False, "Q"), (True, "call"), (False, " out"), (True, " done<|im_end|>")]
    found = runs(load(tmp_path, tokenizer, {"prompt": "Q", "parts": parts[:2]}), tokenizer)
    assert found == [(False, "Q"), (True, "call"), (False, " out")]


@pytest.mark.parametrize("as_list", [False, True])
def test_prompt_and_completion_in_the_chat_template(as_list: bool, tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    asked, told = TALK[:3], TALK[3:]
    row = {"prompt": asked, "completion": told if as_list else told[0]["content"]}
    found = runs(load(tmp_path, tokenizer, row), tokenizer)
    assert [text for learn, text in found if learn] == ["8 <|im_end|>"]  # not the answer in the prompt
    text = {"prompt": "Hi", "completion": "Ho"}
    found = runs(load(tmp_path, tokenizer, text, chat_template=True), tokenizer)
    assert found[0][1].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert found[1] == (True, "Ho<|im_end|>")


def test_a_sequence_is_a_trajectory_whose_actions_are_learned(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    found = load(tmp_path, tokenizer, {"messages": TALK})
    (trajectory,) = found.group(0).trajectories
    assert trajectory.token_ids().tolist() == found.tokens.tolist()
    assert trajectory.action_mask().tolist() == found.learn.tolist()
    kinds = [span.kind for span in trajectory.spans]
    assert kinds == [SpanKind.PROMPT, SpanKind.ACTION, SpanKind.OBSERVATION, SpanKind.ACTION]


def test_long_sequences_are_cut_dropped_or_refused_and_counted(tmp_path: Path) -> None:
    tokenizer = qwen_tokenizer.load()
    rows = (
        {"prompt": "a b", "completion": " c d e f g"},
        {"prompt": "a b", "completion": " c"},
        {"prompt": "a b c d e", "completion": " f"},
    )
    found = load(tmp_path, tokenizer, *rows, sft={"max_tokens": 4})
    assert found.lengths.tolist() == [4, 4]
    assert (found.counts.truncated, found.counts.dropped) == (1, 1)  # of the last nothing to learn is left
    found = load(tmp_path, tokenizer, *rows, sft={"max_tokens": 4, "overlong": "drop"})
    assert (len(found), found.counts.truncated, found.counts.dropped) == (1, 0, 2)
    with pytest.raises(UserError, match=r'rows.jsonl:1: a sequence of 8 tokens, sft.max_tokens is 4.*"truncate"'):
        load(tmp_path, tokenizer, *rows, sft={"max_tokens": 4, "overlong": "refuse"})
    with pytest.raises(UserError, match=r"data.train: .*no sequences.*sft.max_tokens = 2; raise it"):
        load(tmp_path, tokenizer, *rows, sft={"max_tokens": 2})


BAD = [
    ({"text": "x"}, r":1: key 'messages': no 'messages', and no 'prompt' with 'completion'; the row has 'text'"),
    ({"messages": "x"}, r"key 'messages': want a list of messages"),
    ({"messages": [{"role": "user"}]}, r"key 'messages': message 1: .*content"),
    ({"messages": TALK[:1]}, r"nothing to learn"),
    ({"messages": TALK[1:2]}, r"the first message is the assistant's; a prompt comes first"),
    ({"messages": TALK, "parts": [{"text": "9 ", "learn": True}]}, r"key 'parts': the parts are not the text"),
    ({"messages": TALK, "parts": [{"text": "8 ", "learn": False}]}, r"no part has 'learn' true"),
    ({"messages": TALK, "parts": [{"text": "8 "}]}, r"key 'parts': part 1: want \{'text'"),
    ({"prompt": " ", "completion": "x"}, r"key 'prompt': empty or blank"),
    ({"prompt": "x", "completion": 5}, r"key 'completion': want a text"),
    ({"prompt": "x", "completion": ""}, r"key 'completion': want a text"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_rows_are_one_line_that_names_the_place(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path, qwen_tokenizer.load(), row)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")
    assert "\n" not in str(caught.value)


TEMPLATES = [
    (None, r"no chat template; give prompt and completion as texts"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", r"no special token.*not learn to stop"),
    (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}",
        r"message 2: the chat template asks for it with .*<think>.*prompt and completion as texts",
    ),
    (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
        r"message 2: the chat template leaves out a part of what the assistant says",
    ),
]


@pytest.mark.parametrize(("template", "words"), TEMPLATES, ids=[words[:30] for _, words in TEMPLATES])
def test_a_template_that_cannot_be_learned_from_is_refused(
    template: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = qwen_tokenizer.load()
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=words):
        load(tmp_path, tokenizer, {"messages": TALK})
