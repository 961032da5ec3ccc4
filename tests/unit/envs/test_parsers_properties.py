"""Call parsers on whatever a policy may write: never an error, always quick, the same however the text is cut."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stare_megatron.data.boxed import last_boxed
from stare_megatron.envs.parsers.base import Parsed, Parser, Request
from stare_megatron.envs.parsers.fenced import FENCE, Fenced
from stare_megatron.envs.parsers.hermes import CLOSE, Hermes
from stare_megatron.envs.parsers.retool import ReTool
from stare_megatron.errors import UserError
from tests import byte_tokenizer
from tests.properties import SCALARS, TEXT, bounded, nested

TOKENIZER = byte_tokenizer.make()
PARALLEL = Hermes(TOKENIZER, "python", parallel=True)
STOPPING: list[Parser] = [Hermes(TOKENIZER, "python", parallel=False), ReTool(TOKENIZER), Fenced(TOKENIZER)]
PARSERS = [*STOPPING, PARALLEL]

_MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<code>",
    "</code>",
    "```",
    "```python",
    "```py\n",
    "\n```\n",
    "\n",
    " ",
    "{",
    "}",
]
_CALLS = st.builds(
    lambda name, arguments, more: json.dumps({"name": name, "arguments": arguments} | more),
    st.just("python") | nested(SCALARS),
    st.fixed_dictionaries({"code": TEXT}) | nested(SCALARS),
    st.dictionaries(TEXT, nested(SCALARS), max_size=1),
)
_CLOSED = st.sampled_from(
    [
        ("<tool_call>\n", "\n</tool_call>"),
        ("<code>\n", "</code>"),
        ("<code>```python\n", "\n```</code>"),
        ("```python\n", "\n```\n"),
    ]
)
# What a policy writes: prose, pieces of the forms, and calls, whole and broken.
WRITTEN = st.lists(
    st.sampled_from(_MARKS) | TEXT | _CALLS | st.tuples(_CLOSED, TEXT | _CALLS).map(lambda t: t[0][0] + t[1] + t[0][1]),
    max_size=8,
).map("".join)


def is_text(value: str) -> bool:
    return value == value.encode("utf-8", "ignore").decode()


def check(parsed: Parsed, text: str) -> None:
    assert text.endswith(parsed.trailing)
    for call in parsed.calls:
        said = call.tool + (call.code if isinstance(call, Request) else call.error)
        assert is_text(said) or not is_text(text)  # half surrogates come from nowhere but the text itself
        assert isinstance(call, Request) or call.error


@bounded(250)
@given(WRITTEN, st.booleans())
def test_no_text_is_an_error(text: str, ended: bool) -> None:
    for parser in PARSERS:
        parsed = parser.parse(text, ended=ended)
        check(parsed, text)
        assert parser.parse(text, ended=ended) == parsed
        if parsed.calls:
            parser.render(text, [[1]] * len(parsed.calls), ended=ended)


@bounded(200)
@given(WRITTEN, st.integers(0, 400), st.integers(0, 400))
def test_a_turn_says_the_same_wherever_it_is_cut(text: str, first: int, second: int) -> None:
    """The engine stops at some token at or after the stop string: what it adds changes what trails, not the calls."""
    for parser in STOPPING:
        end = text.find(parser.stop[0])
        if end < 0:
            continue
        end += len(parser.stop[0])
        short, long = sorted((min(end + first, len(text)), min(end + second, len(text))))
        a, b = (parser.parse(text[:cut], ended=False) for cut in (short, long))
        assert (a.calls, a.unfinished) == (b.calls, b.unfinished)
        if a.calls or a.unfinished:
            assert (a.trailing, b.trailing) == (text[end:short], text[end:long])
        assert not any(isinstance(call, Request) for call in parser.parse(text[: end - 1], ended=False).calls)


@bounded(150)
@given(WRITTEN.filter(is_text), st.integers(0, 400))
def test_tokens_may_cut_characters(text: str, count: int) -> None:
    ids = TOKENIZER.encode(text.encode("utf-8", "replace").decode())
    whole, cut = TOKENIZER.decode(ids), TOKENIZER.decode(ids[:count])
    for parser in PARSERS:
        check(parser.parse(cut, ended=False), cut)
        stop = parser.stop[0] if parser.stop else None
        if stop and stop in cut:
            assert parser.parse(cut, ended=False).calls == parser.parse(whole, ended=False).calls


CODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)


@bounded(200)
@given(CODE, TEXT)
def test_code_arrives_as_it_was_written(code: str, prose: str) -> None:
    call = f"<tool_call>\n{json.dumps({'name': 'python', 'arguments': {'code': code}})}\n</tool_call>"
    if CLOSE not in code and "<tool_call>" not in prose:
        for parser in (STOPPING[0], PARALLEL):
            assert parser.parse(prose + call, ended=False) == Parsed((Request("python", code),))
    if "</code>" not in code + prose and "```" not in code:
        body = code.rstrip(" \t").removesuffix("\n")
        if body.strip():
            said = STOPPING[1].parse(f"{prose}<code>\n```python\n{code}\n```\n</code>", ended=False)
            assert "<code>" in code or said == Parsed((Request("python", code),))
    if FENCE not in f"{prose}\n{code}\n```\n"[:-1] and "```" not in code:
        assert STOPPING[2].parse(f"{prose}\n```python\n{code}\n```\n", ended=False) == Parsed(
            (Request("python", code),)
        )


@bounded(100)
@given(st.lists(CODE, min_size=1, max_size=4).filter(lambda codes: not any("tool_call>" in code for code in codes)))
def test_parallel_calls_keep_their_order(codes: list[str]) -> None:
    text = "".join(
        f"so <tool_call>{json.dumps({'name': 'python', 'arguments': {'code': code}})}</tool_call>" for code in codes
    )
    assert PARALLEL.parse(text, ended=True).calls == tuple(Request("python", code) for code in codes)


_SIZE = 20_000
# Each was, or could be, quadratic: minutes of an engine's event loop for one response of this length.
DEGENERATE = {
    "white space in a fence": "<code>```\n" + " " * _SIZE + "x</code>",
    "lines in a fence": "<code>```\n" + "\n" * _SIZE + "x</code>",
    "fences in a call": "<code>" + "```\n" * _SIZE + "</code>",
    "blanks before fences": "<code>```\n" + ("```" + " " * 100) * (_SIZE // 20) + "x</code>",
    "opening marks": "<tool_call>" * _SIZE,
    "code marks": "<code>" * _SIZE + "</code>",
    "many calls": "<tool_call>{}</tool_call>" * (_SIZE // 5),
    "nested lists": "<tool_call>" + "[" * _SIZE + "</tool_call>",
    "a long number": "<tool_call>" + "9" * (5 * _SIZE) + "</tool_call>",
    "opened blocks": "\n```python" * _SIZE + "\n```\n",
    "tabs after blocks": ("\n```python" + "\t" * 10) * _SIZE + "\n```\n",
}


@pytest.mark.parametrize("text", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_text_takes_no_time(text: str) -> None:
    for parser in PARSERS:
        began = time.process_time()
        check(parser.parse(text, ended=False), text)
        assert time.process_time() - began < 1.0, type(parser).__name__


@bounded(200)
@given(
    st.lists(st.sampled_from(["\\boxed", "\\fbox{", "{", "}", "\\{", "\\", "5", "-1.5", " "]) | TEXT, max_size=12).map(
        "".join
    )
)
@example("\\boxed{" * 4000)
@example("{" * 20_000 + "\\boxed{" + "}" * 40_000)
def test_boxes_in_any_text(text: str) -> None:
    began = time.process_time()
    found = last_boxed(text)
    assert time.process_time() - began < 1.0
    assert found is None or found in text
    assert last_boxed(text + "\\boxed{7}") == "7"


@bounded(100)
@given(st.text("ab1{}\\ ", max_size=12), st.integers(0, 30))
def test_of_nested_boxes_the_innermost_counts(inside: str, depth: int) -> None:
    balanced = last_boxed("\\boxed{" + inside + "}")
    assert last_boxed("\\boxed{" * depth + "\\boxed{4}" + "}" * depth) == "4"
    if "boxed" not in inside and inside.count("{") == inside.count("}") == inside.count("\\") == 0:
        assert balanced == inside.strip()


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ [] + 1 }}", "{% for", "{{ messages[9].role }}"])
def test_a_damaged_template_is_refused(template: str) -> None:
    with pytest.raises(UserError, match=r'env\.parser = "hermes": the chat template .* cannot be used'):
        Hermes(byte_tokenizer.make(template), "python", parallel=False)
