import random

import pytest
import torch

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.tasks.base import TaskPrompt, parts_of
from stare_megatron.tasks.tiny_model import _supervised, make_tokenizer
from stare_megatron.tasks.tool_arithmetic import TASK

PROMPT = TaskPrompt("p", "347*582=", "201954")


def traces(count=400):
    rng = random.Random(0)
    return {TASK.trace(PROMPT, rng) for _ in range(count)}


def test_worked_answers_are_right_and_many():
    every = traces()
    assert all(TASK.verify(PROMPT.text, PROMPT.answer, trace).correct for trace in every)
    assert len(every) == 1 + 2 + 2 * 8  # by heart, printed, by way of a variable
    calls = [trace.removesuffix("201954") for trace in every - {"201954"}]
    assert {TASK.tool.answer(call) for call in calls} == {"\n<interpreter>\n201954\n</interpreter>\n"}


@pytest.mark.parametrize(
    "response",
    ["", "201955", " 201954", "201954 ", "201954</code>", "<code>print(347*582)</code>", "0201954", "x</code>20195"],
)
def test_anything_else_is_wrong(response):
    assert not TASK.verify(PROMPT.text, PROMPT.answer, response).correct


def test_a_call_of_another_kind_is_an_error():
    for call in ("<code>print(347*58)print(2)</code>", "<code>a=3*4\nprint(b)</code>", "<code></code>"):
        assert TASK.tool.answer(call) == "\n<interpreter>\nError\n</interpreter>\n"


def test_splits_do_not_share_products():
    prompts = {split: TASK.prompts(split, 500, 0) for split in ("train", "eval", "test")}
    factors = {s: {frozenset(p.text.rstrip("=").split("*")) for p in ps} for s, ps in prompts.items()}
    assert not factors["train"] & factors["eval"] | factors["train"] & factors["test"]
    assert not factors["eval"] & factors["test"]
    assert prompts["train"] == TASK.prompts("train", 500, 0) != TASK.prompts("train", 500, 1)
    assert len({p.text for p in prompts["train"]}) == 500
    with pytest.raises(UserError, match="prompts asked"):
        TASK.prompts("train", 500_000, 0)


def test_the_tokenizer_keeps_text_as_it_is():
    tokenizer = make_tokenizer(tasks.get("tool_arithmetic"))
    said = '<interpreter>Traceback (most recent call last):\n  File "<cell 1>", line 1\n</interpreter>'
    for text in (*traces(), said):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("<code>print(347*582)</code>", add_special_tokens=False)) == 11
    assert len(tokenizer.encode(PROMPT.text)) == TASK.max_prompt_tokens
    actions = max(len(tokenizer.encode(t, add_special_tokens=False)) for t in traces())
    assert actions + 1 <= TASK.max_response_tokens


def test_no_loss_on_what_the_tool_answers():
    tokenizer = make_tokenizer(TASK)
    trace = "<code>print(347*582)</code>201954"
    ids, labels = _supervised(tokenizer, [(PROMPT.text, parts_of(TASK, trace))])
    written = ids[0][labels[0] != -100]
    assert tokenizer.decode(written) == trace + "<eos>"
    assert torch.equal(written, labels[0][labels[0] != -100])
    assert "\n<interpreter>\n201954\n</interpreter>\n" in tokenizer.decode(ids[0])
