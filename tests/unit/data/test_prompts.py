import datetime
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from stare_megatron import tasks
from stare_megatron.config import DataConfig
from stare_megatron.data.chat import writes_date
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.errors import UserError
from stare_megatron.tasks.tiny_model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer(tasks.get("order_free_sum"))
    made.chat_template = (
        "<bos> {% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}( {{ m.content }} ) "
        "{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return made


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes lines to a JSONL file and loads it."""

    def run(*lines, **config):
        path = tmp_path / "p.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return load_prompts(DataConfig(train=[path], **config), tokenizer)

    return run


def row(number: int, **more) -> dict:
    return {"id": f"r{number}", "source": "s", "prompt": f"{number} :", "answer": number} | more


def test_rows_become_prompts(load):
    prompts = load(row(1), "", row(12, answer="x"))
    assert len(prompts) == 2
    assert prompts[1].id == "r12"
    assert prompts[1].text == "12 :"
    assert prompts[1].token_ids == (1, 24, 5)
    assert (prompts[0].answer, prompts[1].answer) == ("1", "x")
    assert (prompts[0].source, prompts.dropped) == ("s", 0)


def test_ids_and_sources_have_defaults(load, tmp_path):
    prompts = load({"prompt": "1 :", "answer": "1"}, "", {"prompt": "2 :", "answer": "2"})
    assert [prompts[i].id for i in range(2)] == [f"{tmp_path}/p.jsonl:1", f"{tmp_path}/p.jsonl:3"]
    assert prompts[0].source == "p"


def test_nested_keys(load):
    nested = load({"q": {"text": "5 :"}, "rm": {"truth": 5}}, prompt_key="q.text", answer_key="rm.truth")
    assert (nested[0].text, nested[0].answer) == ("5 :", "5")


def test_further_columns_reach_the_prompt(load):
    rows = [row(1, tests=["a", {"b": 1.5}], rubric={"clear": None}, big="x"), row(2, tests=[], rubric={"clear": True})]
    prompts = load(*rows, extra_keys=["tests", "rubric.clear"])
    assert prompts[0].extra == {"tests": ["a", {"b": 1.5}], "rubric.clear": None}
    assert prompts[1].extra == {"tests": [], "rubric.clear": True}
    assert hash(prompts[0]) != hash(prompts[1])
    plain = load(*rows)
    assert plain[0].extra == {}
    assert prompts.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match=r"p\.jsonl:1: no key 'test'; the row has 'id'"):
        load(*rows, extra_keys=["test"])


def test_without_further_columns_the_fingerprint_is_that_of_earlier_versions(load):
    """Else no run could be resumed."""
    digest = hashlib.blake2b(digest_size=16)
    for number in (1, 2):
        digest.update(json.dumps([f"r{number}", f"{number} :", str(number)]).encode())
    assert load(row(1), row(2, more=3)).fingerprint == digest.hexdigest()


def test_values_that_json_cannot_hold_are_refused(tmp_path, tokenizer):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([row(1, raw=b"bytes")]), path)
    with pytest.raises(UserError, match=r"p\.parquet:1: key 'raw': data\.extra_keys: a value that JSON cannot hold"):
        load_prompts(DataConfig(train=[path], extra_keys=["raw"]), tokenizer)


def test_chat_prompts_go_through_the_template_once(load):
    messages = [{"role": "user", "content": "3 + 4"}]
    prompts = load(row(1, prompt=messages))
    assert prompts[0].text == "<bos> ( 3 + 4 ) ="
    assert prompts[0].token_ids == (1, 9, 15, 4, 16, 10, 6)  # one <bos>
    same = load(row(1, prompt="3 + 4"), chat_template=True)
    assert same[0].token_ids == prompts[0].token_ids


def test_parquet_reads_like_jsonl(load, tmp_path, tokenizer):
    rows = [row(i) for i in range(1, 8)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    a, b = load(*rows), load_prompts(DataConfig(train=[path]), tokenizer)
    assert a.fingerprint == b.fingerprint
    assert [a[i] for i in range(7)] == [b[i] for i in range(7)]


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        ((row(1), "{oops"), {}, "p.jsonl:2: not valid JSON"),
        ((row(1), "[1]"), {}, "p.jsonl:2: want one JSON object"),
        (
            (row(1), {"id": "b", "prompt": "2 :"}),
            {},
            "p.jsonl:2: no key 'answer'; the row has 'id', 'prompt'; data.prompt_key, data.answer_key",
        ),
        ((row(1),), {"prompt_key": "question"}, "p.jsonl:1: no key 'question'"),
        ((row(1), row(2, id="r1")), {}, r"p.jsonl:2: id 'r1' was used before, at .*p.jsonl:1"),
        ((row(1, prompt=3),), {}, "key 'prompt': want a string or a list"),
        ((row(1, prompt=[{"role": "user"}]),), {}, "want messages with 'role' and 'content'"),
        ((row(1, prompt=[{"role": "system", "content": "1"}]),), {}, "p.jsonl:1: .*refuses it: no system"),
        ((row(1, answer=None),), {}, "p.jsonl:1: key 'answer': want a string or a number"),
        ((), {}, "the file is empty"),
        (("", ""), {}, "the data set is empty"),
        ((row(1, prompt="1 2 3 4"),), {"max_prompt_tokens": 4}, "all 1 prompts are longer"),
        (
            (row(1, prompt="1 2 3 4"),),
            {"max_prompt_tokens": 4, "overlong_prompts": "refuse"},
            "p.jsonl:1: a prompt of 5 tokens, data.max_prompt_tokens is 4",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(load, lines, config, message):
    with pytest.raises(UserError, match=message) as caught:
        load(*lines, **config)
    assert "\n" not in str(caught.value)


def test_overlong_prompts_are_dropped_and_counted(load):
    prompts = load(row(1), row(2, prompt="1 2 3 4"), row(3), max_prompt_tokens=4)
    assert ([prompts[i].id for i in range(2)], len(prompts), prompts.dropped) == (["r1", "r3"], 2, 1)


def test_bad_files(tmp_path, tokenizer):
    for name, text, message in (
        ("none.jsonl", None, "cannot read it: No such file"),
        ("p.csv", "a", "want a file that ends in .jsonl, .json, .parquet"),
        ("p.parquet", "not parquet", "not a readable parquet file"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "not UTF-8"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"{name}(:1)?: .*{message}"):
            load_prompts(DataConfig(train=[path]), tokenizer)


def test_chat_prompt_without_a_template(load, tokenizer, tmp_path):
    plain = make_tokenizer(tasks.get("order_free_sum"))
    load(row(1))
    with pytest.raises(UserError, match="no chat template"):
        load_prompts(DataConfig(train=[tmp_path / "p.jsonl"], chat_template=True), plain)


def test_a_stream_shuffles_each_epoch_and_covers_it(load):
    stream = PromptStream(load(*(row(i) for i in range(1, 11))), seed=7, shuffle=True)
    first, second = ([p.id for p in stream.take(10)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"r{i}" for i in range(1, 11))
    assert first != second
    assert (stream.state().epoch, stream.state().cursor) == (1, 10)


def test_a_stream_without_shuffle_keeps_the_order(load):
    stream = PromptStream(load(*(row(i) for i in range(1, 4))), seed=7, shuffle=False)
    assert [p.id for p in stream.take(5)] == ["r1", "r2", "r3", "r1", "r2"]


@pytest.mark.parametrize("taken", [0, 3, 10, 17])
def test_a_restored_stream_goes_on_exactly(load, taken):
    prompts = load(*(row(i) for i in range(1, 11)))
    stream = PromptStream(prompts, seed=7, shuffle=True)
    stream.take(taken)
    other = PromptStream(prompts, seed=8, shuffle=True)  # the state's seed counts
    other.restore(stream.state())
    assert other.state() == stream.state()
    assert [p.id for p in other.take(25)] == [p.id for p in stream.take(25)]


def test_a_stream_refuses_the_state_of_other_prompts(load):
    state = PromptStream(load(row(1), row(2)), seed=0, shuffle=True).state()
    with pytest.raises(UserError, match="not those of the checkpoint"):
        PromptStream(load(row(1), row(2, answer=3)), seed=0, shuffle=True).restore(state)


def test_the_probe_is_the_longest_prompt(load):
    stream = PromptStream(load(row(1), row(2, prompt="2 3 4 :"), row(3)), seed=0, shuffle=True)
    np.testing.assert_array_equal(stream.probe(), np.array([1, 14, 15, 16, 5], np.int32))


def test_tokenizer_faults_are_user_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"config\.json: cannot read"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 112}')
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 112
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 111}')
    with pytest.raises(UserError, match=r"vocabulary mismatch: .* token id 111, config\.json says .* 111"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')
    with pytest.raises(UserError, match="vocab_size = 'many'"):
        load_tokenizer(tmp_path)


DATED = "today is {{ strftime_now('%d %b %Y, %H:%M') }} {% for m in messages %}( {{ m.content }} ) {% endfor %}"


class Clock(datetime.datetime):
    """What `transformers` asks for the time."""

    day = datetime.datetime(2026, 11, 27, 17, 5)

    @classmethod
    def now(cls, tz=None):
        return cls.day


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def test_a_template_that_writes_the_date_writes_that_of_the_run(load, tokenizer, clock, monkeypatch):
    assert not writes_date(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    assert writes_date(tokenizer)
    chat = row(1, prompt=[{"role": "user", "content": "3 + 4"}])
    monkeypatch.setattr(clock, "day", datetime.datetime(2026, 11, 27, 17, 5))
    unpinned, pinned = load(chat), load(chat, date="2026-11-27")
    assert unpinned[0].text == "today is 27 Nov 2026, 17:05 ( 3 + 4 ) "
    assert pinned[0].text == "today is 27 Nov 2026, 00:00 ( 3 + 4 ) "
    monkeypatch.setattr(clock, "day", datetime.datetime(2026, 11, 28, 9, 0))
    assert load(chat)[0].text != unpinned[0].text  # what used to make a resume impossible
    again = load(chat, date="2026-11-27")
    assert again[0].text == pinned[0].text
    PromptStream(again, 1, shuffle=False).restore(PromptStream(pinned, 1, shuffle=False).state())


@pytest.mark.parametrize("date", ["27.11.2026", "2026-02-30", "20261127", "tomorrow"])
def test_a_date_is_a_date(date):
    with pytest.raises(ValueError, match=r"date"):
        DataConfig(train=["p.jsonl"], date=date)
