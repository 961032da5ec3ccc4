"""The checkpoint's tokenizer, checked against the checkpoint's vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stare_megatron.errors import UserError
from stare_megatron.host.files import disguise, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any of these holds a vocabulary.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
# All that decides which ids a text becomes.
FILES = (
    *_VOCABULARIES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)

_NONE: Mapping[str, Any] = MappingProxyType({})
_MODEL = ("config.json", "generation_config.json")


def has_tokenizer(model: Path) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((model / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(model: Path, variables: Mapping[str, Any] = _NONE) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint folder: its tokenizer.json as it is, else what AutoTokenizer makes.

    It is the model's: every id has a row in the embedding, and at least half of the rows have a token (padding of a
    vocabulary is a few per cent); its special tokens are in its vocabulary, and so are those that config.json and
    generation_config.json name, of which one that ends a sequence is special. `variables`: what its chat template
    finds set (`data.chat_template_kwargs`), whoever calls it.

    Raises:
        UserError: no such folder, no config.json or tokenizer in it, a damaged file, no end-of-sequence token, or a
            tokenizer that is another model's ("vocabulary mismatch"); a variable that its chat template does not name.
    """
    vocab_size = read_vocab_size(model)
    trees = read_files(model)
    if not has_tokenizer(model):  # AutoTokenizer would make an empty one
        raise UserError(
            f"{model}: no tokenizer: none of {', '.join(_VOCABULARIES)}; copy the tokenizer of the base model here"
        )
    tokenizer = _load(model, trees)
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"{model}: vocabulary mismatch: the tokenizer has token id {largest}, config.json says vocab_size = "
            f"{vocab_size}; use the tokenizer this checkpoint was saved with"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.is_fast:
        _check_special_tokens(model, tokenizer, trees)
    _check_special_ids(model, tokenizer, set(vocabulary.values()), trees)
    if 2 * len(vocabulary) < vocab_size:
        raise UserError(
            f"{model}: the tokenizer has {len(vocabulary):,} tokens, the embedding {vocab_size:,} rows; it is another "
            "model's"
        )
    if variables:
        tokenizer.chat_template = _with_variables(model, tokenizer.chat_template, variables)
    return tokenizer


def _with_variables(model: Path, template: Any, variables: Mapping[str, Any]) -> str:
    """The chat template behind statements that set the variables. Raises: UserError: it does not name one of them."""
    if not isinstance(template, str):
        raise UserError(
            f"{model}: data.chat_template_kwargs is set, but the tokenizer has no chat template; leave it out"
        )
    for name in variables:
        if not re.search(rf"\b{name}\b", template):
            raise UserError(
                f"{model}: data.chat_template_kwargs has {name!r}, which the chat template does not name; take it out"
            )
    # JSON's texts, numbers, true and false are Jinja's too.
    return "".join(f"{{%- set {n} = {json.dumps(v)} %}}" for n, v in variables.items()) + "{{- '' }}" + template


def read_files(model: Path) -> dict[str, dict[str, Any]]:
    """The JSON of the two configurations and of the tokenizer's files, by name.

    Raises:
        UserError: one of them is damaged, or one of the tokenizer's other files a Git LFS pointer or the like.
    """
    found = {}
    for path in (model / name for name in (*_MODEL, *FILES)):
        if not path.is_file():
            continue
        if path.suffix == ".json":
            found[path.name] = read_object(path)
        elif what := disguise(path):
            raise UserError(f"{path}: {what}")
    return found


def _load(model: Path, trees: dict[str, dict[str, Any]]) -> PreTrainedTokenizerBase:
    """As transformers reads the folder; also the two configurations, which the engines are going to read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    # AutoTokenizer of transformers 5 rebuilds the tokenizer of some architectures (qwen2 among them) with its own
    # splitting rules, whatever tokenizer.json says: wrong for DeepSeek-R1-Distill-Qwen and for our word-level ones.
    loader = PreTrainedTokenizerFast if (model / "tokenizer.json").is_file() else AutoTokenizer
    what = "tokenizer"
    try:
        tokenizer = loader.from_pretrained(str(model), local_files_only=True)
        if "model_type" in trees[what := "config.json"]:
            AutoConfig.from_pretrained(str(model), local_files_only=True)
        if (what := "generation_config.json") in trees:
            GenerationConfig.from_pretrained(str(model), local_files_only=True)
    except Exception as e:  # a damaged file raises anything; the tokenizers library the bare class
        if not isinstance(e, MemoryError):
            raise UserError(f"{model}: no {what} that transformers can load: {first_line(e):.300}") from e
        raise
    return tokenizer


def _check_special_tokens(model: Path, tokenizer: Any, trees: dict[str, dict[str, Any]]) -> None:
    """Those that no file gives an id would get a new one from transformers."""
    known = dict(trees.get("added_tokens.json", {}))
    added = trees.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    known |= {token["content"]: int(i) for i, token in added.items()}
    added = trees.get("tokenizer.json", {}).get("added_tokens") or ()
    known |= {token["content"]: token["id"] for token in added}
    for token in tokenizer.all_special_tokens:
        new = tokenizer.convert_tokens_to_ids(token)
        if known.get(token, tokenizer.backend_tokenizer.model.token_to_id(token)) != new:
            raise UserError(
                f"{model / 'tokenizer_config.json'}: the special token {token!r:.60} is not in the vocabulary; it "
                f"would become id {new}, which the model was never trained on; name one of the tokenizer's tokens"
            )


def _check_special_ids(
    model: Path, tokenizer: PreTrainedTokenizerBase, ids: set[int], trees: dict[str, dict[str, Any]]
) -> None:
    """Special tokens that the two configurations name. `ids`: of all tokens."""
    other = "it is another model's, or the file names a wrong id"
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends: dict[int, str] = {}  # and the file that names it
    for name in _MODEL:
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = trees.get(name, {}).get(field)
            values = value if isinstance(value, list) else [] if value is None else [value]
            for one in values:
                if type(one) is not int:
                    raise UserError(f"{model / name}: {field} = {value!r:.60} should be a token id or a list of them")
                if one not in ids and one != -1:  # -1: there is none
                    raise UserError(
                        f"{model / name}: {field} = {one!r:.20} is no token of the tokenizer beside it; {other}"
                    )
            if field == "eos_token_id":
                ends = {one: name for one in values if one != -1} | ends
    if ends and not ends.keys() & special:
        end = min(ends)
        raise UserError(f"{model / ends[end]}: eos_token_id = {end} is an ordinary token of the tokenizer; {other}")


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids -> text, special tokens included."""
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))


def ends_a_sequence(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token is an end of sequence: the tokenizer's own, or another special token, which an engine
    stops at because the checkpoint's generation_config.json names several."""
    if not token_ids:
        return False
    last = int(token_ids[-1])
    if last == tokenizer.eos_token_id:
        return True
    added = tokenizer.added_tokens_decoder
    return last in added and added[last].special


def read_vocab_size(model: Path) -> int:
    """`vocab_size` of a checkpoint folder's config.json.

    Raises:
        UserError: missing or malformed.
    """
    path = model / "config.json"
    size = read_object(path, "; set model.path").get("vocab_size")
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: vocab_size = {size!r:.60}, want a positive number")
    return size


def first_line(error: BaseException) -> str:
    """Of what an error says, lone surrogates escaped: they could not be written out; its type where it says nothing."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return said.encode(errors="backslashreplace").decode()
