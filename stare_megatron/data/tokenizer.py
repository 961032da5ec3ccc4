"""The checkpoint's tokenizer, checked against the checkpoint's vocabulary."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stare_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any of these holds a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
# All that decides which ids a text becomes.
FILES = (
    *_VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def has_tokenizer(model: Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((model / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint folder: its tokenizer.json as it is, else what AutoTokenizer makes.

    Raises:
        UserError: no such folder, no config.json or tokenizer in it, no end-of-sequence token, or token ids that the
            model's embedding does not have ("vocabulary mismatch").
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab_size = read_vocab_size(model)
    if not has_tokenizer(model):  # AutoTokenizer would make an empty one
        raise UserError(
            f"{model}: no tokenizer: none of {', '.join(_VOCABULARIES)}; copy the tokenizer of the base model here"
        )
    # AutoTokenizer of transformers 5 rebuilds the tokenizer of some architectures (qwen2 among them) with its own
    # splitting rules, whatever tokenizer.json says: wrong for DeepSeek-R1-Distill-Qwen and for our word-level ones.
    loader = PreTrainedTokenizerFast if (model / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"{model}: no tokenizer that transformers can load: {first_line(e)}") from e
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"{model}: vocabulary mismatch: the tokenizer has token id {largest}, config.json says vocab_size = "
            f"{vocab_size}; use the tokenizer this checkpoint was saved with"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date: `strftime_now` is the only clock that transformers gives it."""
    return "strftime_now" in str(tokenizer.chat_template)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], date: str) -> str:
    """Messages as the chat template writes them, generation prompt included. `date`: the day it is then, and midnight,
    ISO; empty: today.

    Raises:
        jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError: the template refuses them.
    """
    clock: dict[str, Any] = {"strftime_now": datetime.datetime.fromisoformat(date).strftime} if date else {}
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **clock))


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids -> text, special tokens included."""
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))


def read_vocab_size(model: Path) -> int:
    """`vocab_size` of a checkpoint folder's config.json.

    Raises:
        UserError: missing or malformed.
    """
    path = model / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: cannot read the checkpoint's configuration: {e.strerror}; set model.path") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: vocab_size = {size!r}, want a positive number")
    return size


def first_line(error: BaseException) -> str:
    """Of what an error says; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
