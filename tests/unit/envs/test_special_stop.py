"""Tokenizers whose marks of a tool call are special tokens: the mark ends the call, not the sequence."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from stare_megatron.config.env import ToolUseConfig
from stare_megatron.envs.base import End
from stare_megatron.envs.tool_use import ToolUse
from stare_megatron.types import Completion, Prompt, Status
from tests import byte_tokenizer
from tests.unit.envs.test_tool_use import Box, call

RETOOL = "<code>print(2 + 2)</code>"


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    made = byte_tokenizer.make()
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


@pytest.mark.parametrize(("parser", "text"), [("hermes", call("print(2 + 2)")), ("retool", RETOOL)])
@pytest.mark.parametrize("special", [("</tool_call>", "</code>"), ()])
def test_a_call_that_ends_in_a_special_token_is_run(parser: str, text: str, special: tuple[str, ...]) -> None:
    made, box = tokenizer(*special), Box()
    prompt = Prompt("p", "s", "q", tuple(made.encode("q")), "")
    env = ToolUse(prompt, box, made, ToolUseConfig.model_validate({"parser": parser}))

    async def play() -> str:
        await env.reset()
        ids = np.array(made.encode(text), np.int32)
        seen = await env.step(Completion(ids, np.zeros(len(ids), np.float32), Status.COMPLETED, 1))
        assert not isinstance(seen, End)
        return str(made.decode(seen.tolist()))

    assert "4" in asyncio.run(play())
    assert box.codes == ["print(2 + 2)"]
