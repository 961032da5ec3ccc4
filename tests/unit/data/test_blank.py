"""What counts as nothing: texts of which nothing can be seen, alone and among messages and columns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.data.chat import ChatTemplate
from stare_megatron.data.prepare.extract import problems
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.types import Problem
from stare_megatron.data.rows import is_blank
from tests import byte_tokenizer

# As Qwen's: a call of a tool in the place of its message's text.
CALLING = byte_tokenizer.make(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\ufeff", "\u00ad", "\u2028\u2029", "\x00\x1f", "\ud800"])
def test_what_cannot_be_seen_is_blank(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["x", "\U0001f600", "\U0001fae9", "\ue000", "\U000f0000", " \u0301", "。"])
def test_whatever_has_a_glyph_is_not(text: str) -> None:
    """Also what is newer than this Python's Unicode, and of private use."""
    assert not is_blank(text)


def messages(content: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": content, **more},
        {"role": "tool", "content": "4"},
    ]


CALLS = [{"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}]


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["called", "said", "empty"])), ids=lambda order: "-".join(order)
)
def test_a_call_without_a_text_is_no_lost_message_in_any_order_of_rows(order: tuple[str, ...]) -> None:
    rows = {"called": messages("", tool_calls=CALLS), "said": messages("It is four."), "empty": messages(" ")}
    template = ChatTemplate(CALLING, "")
    for name in order:
        text = template.render(rows[name])
        assert ("python" in text, "four" in text) == (name == "called", name == "said")


def test_a_text_beside_a_call_that_the_template_leaves_out_is_refused() -> None:
    for first in (messages("2+2"), messages("", tool_calls=CALLS)):
        template = ChatTemplate(CALLING, "")
        template.render(first)
        with pytest.raises(ValueError, match="leaves out the message of role 'assistant'"):
            template.render(messages("2+2", tool_calls=CALLS))


@pytest.mark.parametrize("published", ["", " ", "\u200b"])
def test_a_row_with_a_blank_id_has_none(tmp_path: Path, published: str) -> None:
    path = tmp_path / "aime.csv"
    path.write_text(f"ID,Year,Question,Answer\n{published},1983,How many?,60\n", encoding="utf-8")
    (found,) = problems(RECIPES["aime-train"], path)
    assert isinstance(found, Problem)
    assert (found.text, found.published_id) == ("How many?", "")
