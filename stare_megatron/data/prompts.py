"""Prompts from JSONL and parquet files: read, tokenised once, and streamed in an order that a resumed run repeats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stare_megatron.config import DataConfig
from stare_megatron.data import rows
from stare_megatron.data.chat import ChatTemplate
from stare_megatron.errors import UserError
from stare_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows tokenised in one call


@dataclass(frozen=True)
class _Row:
    """A row before tokenisation: `text` is what the tokenizer gets, `rendered` whether a chat template wrote it;
    `extra`: the further columns as one JSON object, "" for none."""

    where: str
    id: str
    source: str
    text: str
    rendered: bool
    answer: str
    extra: str


@dataclass(frozen=True, eq=False)
class PromptSet:
    """All prompts of a run, compact: text in Arrow arrays, tokens of prompt i at `tokens[ends[i - 1]:ends[i]]`.

    `tokens` int32 [total], `ends` int64 [prompts]. `extras`: JSON objects, empty without further columns. `dropped`:
    prompts left out for their length. `fingerprint`: hash of every id, prompt, answer and further column in order.
    """

    ids: pa.Array
    sources: pa.Array
    texts: pa.Array
    answers: pa.Array
    extras: pa.Array
    tokens: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    dropped: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(
            id=self.ids[index].as_py(),
            source=self.sources[index].as_py(),
            text=self.texts[index].as_py(),
            token_ids=tuple(self.token_ids(index).tolist()),
            answer=self.answers[index].as_py(),
            extra=json.loads(self.extras[index].as_py()) if len(self.extras) else {},
        )

    def token_ids(self, index: int) -> npt.NDArray[np.int32]:
        """Tokens of one prompt, int32 [n]."""
        begin = self.ends[index - 1] if index else 0
        return self.tokens[begin : self.ends[index]]


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read, check and tokenise the files of `data.train`, in their order.

    A string prompt is encoded with the tokenizer's special tokens (`<bos>`, where it adds one); chat messages, and
    strings under `data.chat_template`, are written out by the chat template, generation prompt included.

    Raises:
        UserError: a file is missing or malformed, a row lacks a column or has a value of another kind, an id occurs
            twice, no prompt is left, or (under `data.overlong_prompts = "refuse"`) a prompt is too long.
    """
    columns: dict[str, list[str]] = {"ids": [], "sources": [], "texts": [], "answers": [], "extras": []}
    tokens: list[npt.NDArray[np.int32]] = []
    seen: dict[str, str] = {}
    digest = hashlib.blake2b(digest_size=16)
    dropped = 0
    for chunk in _chunks(config, tokenizer):
        for row, token_ids in zip(chunk, _encode(chunk, tokenizer), strict=True):
            if row.id in seen:
                raise UserError(f"{row.where}: id {row.id!r} was used before, at {seen[row.id]}; ids must be unique")
            seen[row.id] = row.where
            if _overlong(config, row, len(token_ids)):
                dropped += 1
                continue
            extra = [row.extra] if row.extra else []
            digest.update(json.dumps([row.id, row.text, row.answer, *extra]).encode())
            tokens.append(np.asarray(token_ids, np.int32))
            columns["extras"] += extra
            for name, value in (("ids", row.id), ("sources", row.source), ("texts", row.text), ("answers", row.answer)):
                columns[name].append(value)
    if not tokens:
        files = ", ".join(str(path) for path in config.train)
        why = f"all {dropped} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens}"
        raise UserError(f"{files}: no prompts: {why}")
    return PromptSet(
        ids=pa.array(columns["ids"], pa.large_string()),
        sources=pa.array(columns["sources"], pa.large_string()).dictionary_encode(),
        texts=pa.array(columns["texts"], pa.large_string()),
        answers=pa.array(columns["answers"], pa.large_string()),
        extras=pa.array(columns["extras"], pa.large_string()),
        tokens=np.concatenate(tokens),
        ends=np.cumsum([len(t) for t in tokens], dtype=np.int64),
        dropped=dropped,
        fingerprint=digest.hexdigest(),
    )


def _overlong(config: DataConfig, row: _Row, length: int) -> bool:
    """Whether to drop the row; raises if such rows are refused, or if it has no token at all."""
    if length == 0:
        raise UserError(f"{row.where}: key {config.prompt_key!r}: the prompt has no tokens")
    if length <= config.max_prompt_tokens:
        return False
    if config.overlong_prompts == "refuse":
        raise UserError(
            f"{row.where}: a prompt of {length} tokens, data.max_prompt_tokens is {config.max_prompt_tokens}; raise "
            'it, or set data.overlong_prompts = "drop"'
        )
    return True


def _encode(chunk: list[_Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: list[list[int]] = [[] for _ in chunk]
    for rendered in (False, True):
        chosen = [i for i, row in enumerate(chunk) if row.rendered is rendered]
        if not chosen:
            continue
        # A template writes its own special tokens; adding them again would double `<bos>`.
        batch: Any = tokenizer([chunk[i].text for i in chosen], add_special_tokens=not rendered)
        for i, token_ids in zip(chosen, batch["input_ids"], strict=True):
            encoded[i] = token_ids
    return encoded


def _chunks(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[_Row]]:
    chunk: list[_Row] = []
    template = ChatTemplate(tokenizer, config.date)
    for path in config.train:
        where = ""
        for place, raw in rows.read(path):
            where = f"{path}:{place}"
            if isinstance(raw, rows.Broken):
                raise UserError(f"{where}: {raw.problem}")
            try:
                chunk.append(_row(config, template, path, where, raw))
            except _Refused as e:
                raise UserError(f"{where}: key {e.key!r}: {e}") from e
            except RecursionError as e:
                raise UserError(f"{where}: nested too deep") from e
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if not where:
            raise UserError(f"{path}: no prompts: the data set is empty")
    if chunk:
        yield chunk


class _Refused(Exception):
    """Why the value of `key` cannot be used."""

    def __init__(self, key: str, why: object) -> None:
        super().__init__(why)
        self.key = key


def _row(config: DataConfig, template: ChatTemplate, path: Path, where: str, raw: dict[str, Any]) -> _Row:
    prompt = _lookup(raw, config.prompt_key, where)
    if isinstance(prompt, str) and (rows.is_blank(prompt) or rows.is_written_messages(prompt)):
        why = "empty or blank" if rows.is_blank(prompt) else "messages written as one string; store the list itself"
        raise _Refused(config.prompt_key, why)
    rendered = isinstance(prompt, list) or config.chat_template
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or not isinstance(messages, list):
        why = f"want a string or a list of messages with 'role' and 'content', got {rows.shown(prompt)}"
        raise _Refused(config.prompt_key, why)
    try:
        text = template.render(messages) if rendered else str(prompt)
    except ValueError as e:
        raise _Refused(config.prompt_key, e) from e
    return _Row(
        where=where,
        id=_optional(raw, "id_key", config, where, where),
        source=_optional(raw, "source_key", config, where, path.stem),
        text=text,
        rendered=rendered,
        answer=_text(_lookup(raw, config.answer_key, where), config.answer_key),
        extra=_extra(raw, config.extra_keys, where),
    )


def _extra(raw: dict[str, Any], keys: list[str], where: str) -> str:
    """The further columns as one JSON object; "" for none."""
    texts = []
    for key in dict.fromkeys(keys):
        try:
            texts.append(f"{json.dumps(key)}: {json.dumps(_lookup(raw, key, where), allow_nan=False)}")
        except (TypeError, ValueError) as e:
            raise _Refused(key, f"data.extra_keys: a value that JSON cannot hold: {e}") from e
    return f"{{{', '.join(texts)}}}" if texts else ""


def _lookup(raw: dict[str, Any], key: str, where: str) -> Any:
    value = rows.find(raw, key)
    if value is rows.ABSENT:
        raise UserError(
            f"{where}: no key {key!r}; the row has {', '.join(map(repr, raw)) or 'none'}; data.prompt_key, "
            "data.answer_key and data.extra_keys name the columns"
        )
    return value


def _optional(raw: dict[str, Any], name: str, config: DataConfig, where: str, default: str) -> str:
    """The value of a column that a row may lack, unless `data.NAME` asks for another column than it does by default."""
    key = str(vars(config)[name])
    if key == DataConfig.model_fields[name].default and rows.find(raw, key) is rows.ABSENT:
        return default
    return _text(_lookup(raw, key, where), key)


def _text(value: Any, key: str) -> str:
    try:
        return rows.text_of(value)
    except ValueError as e:
        raise _Refused(key, e) from e


@dataclass(frozen=True)
class StreamState:
    """Where a stream is: `cursor` prompts into pass `epoch` (from 0) over the set with that fingerprint."""

    epoch: int
    cursor: int
    seed: int
    fingerprint: str


class Passes:
    """Passes over `count` things with that fingerprint, each in its own order (seeded by `seed` and the pass), and
    where one stands in them. `others`: says that a state is of other things, and the cure."""

    others: ClassVar[str]

    def __init__(self, count: int, seed: int, shuffle: bool, fingerprint: str) -> None:
        self._count = count
        self._shuffle = shuffle
        self._state = StreamState(0, 0, seed, fingerprint)
        self._order = self._permutation(0)

    def state(self) -> StreamState:
        return self._state

    def restore(self, state: StreamState) -> None:
        """Go on exactly where `state` was taken, with its seed.

        Raises:
            UserError: it is of other things.
        """
        if state.fingerprint != self._state.fingerprint:
            raise UserError(self.others)
        self._move(state.epoch, state.cursor, state.seed)

    def _move(self, epoch: int, cursor: int, seed: int) -> None:
        other = (epoch, seed) != (self._state.epoch, self._state.seed)
        self._state = StreamState(epoch, cursor, seed, self._state.fingerprint)
        if other:
            self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(self._count)
        return np.random.default_rng([self._state.seed, epoch]).permutation(self._count)


class PromptStream(Passes):
    """Endless prompts: pass after pass over the set."""

    others = (
        "data.train: the prompts (or their tokenizer's template) are not those of the checkpoint; resume with "
        "the same files, or start a new run from the exported model"
    )

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool) -> None:
        super().__init__(len(prompts), seed, shuffle, prompts.fingerprint)
        self.prompts = prompts

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        taken = []
        for _ in range(count):
            if self._state.cursor == len(self.prompts):
                self._move(self._state.epoch + 1, 0, self._state.seed)
            taken.append(self.prompts[int(self._order[self._state.cursor])])
            self._move(self._state.epoch, self._state.cursor + 1, self._state.seed)
        return taken

    def probe(self) -> npt.NDArray[np.int32]:
        """The longest prompt (the first of them), int32 [n], n >= 2: what engine and trainer are compared on.

        Raises:
            UserError: every prompt is a single token.
        """
        lengths = np.diff(self.prompts.ends, prepend=0)
        longest = int(lengths.argmax())
        if lengths[longest] < 2:
            raise UserError("data.train: every prompt is a single token; set sync.probe_every = 0 or longer prompts")
        return self.prompts.token_ids(longest).copy()
