"""Forms in which a policy writes tool calls, one file each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from stare_megatron.config.env import ToolUseConfig
from stare_megatron.envs.parsers.base import Parser
from stare_megatron.envs.parsers.fenced import Fenced
from stare_megatron.envs.parsers.hermes import Hermes
from stare_megatron.envs.parsers.retool import ReTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_parser(config: ToolUseConfig, tokenizer: PreTrainedTokenizerBase) -> Parser:
    """The parser that `[env]` asks for; one for all episodes with these settings and this tokenizer.

    Raises:
        UserError: the tokenizer's chat template cannot render what the form needs.
    """
    return _make(config.parser, config.tool, config.parallel_calls, tokenizer)


@functools.lru_cache(maxsize=8)
def _make(name: str, tool: str, parallel: bool, tokenizer: PreTrainedTokenizerBase) -> Parser:
    if name == "hermes":
        return Hermes(tokenizer, tool, parallel=parallel)
    return ReTool(tokenizer) if name == "retool" else Fenced(tokenizer)
