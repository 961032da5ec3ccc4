"""Sequences of supervised training: tokenised once, and in batches whose order a resumed run repeats."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stare_megatron.config import SftConfig
from stare_megatron.data import rows
from stare_megatron.data.conversations import Refused, Writer, Written, merged
from stare_megatron.data.prompts import Passes
from stare_megatron.errors import UserError
from stare_megatron.types import Group, Prompt, Score, Span, SpanKind, Status, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # sequences tokenised in one call


@dataclass(frozen=True)
class Counts:
    """`rows` of the files; `split`: those that made more than one sequence; `truncated` and `dropped`: sequences longer
    than `sft.max_tokens`, dropped ones also where nothing that is learned was left."""

    rows: int
    split: int
    truncated: int
    dropped: int


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """Tokens of sequence i at `tokens[ends[i - 1]:ends[i]]`.

    `tokens` int32 [total]; `learn` bool [total], never the first of a sequence; `ends` int64 [sequences];
    `fingerprint`: hash of all tokens and marks in order.
    """

    tokens: npt.NDArray[np.int32]
    learn: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.int64]
    counts: Counts
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, int64 [sequences]."""
        return np.diff(self.ends, prepend=0)

    def ends_with(self) -> int:
        """The token that most sequences are learned to end with."""
        begins = [0, *self.ends[:-1].tolist()]
        last = [int(np.flatnonzero(self.learn[a:b])[-1]) + a for a, b in zip(begins, self.ends.tolist(), strict=True)]
        return collections.Counter(self.tokens[last].tolist()).most_common(1)[0][0]

    def place(self, index: int) -> slice:
        """Of a sequence in `tokens` and `learn`."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def group(self, index: int) -> Group:
        """A sequence as trainer ranks load it: a trajectory whose actions are what is learned."""
        tokens, learn = self.tokens[self.place(index)], self.learn[self.place(index)]
        spans, begin = [], 0
        for learned, run in itertools.groupby(learn.tolist()):
            n = len(list(run))
            kind = SpanKind.ACTION if learned else SpanKind.OBSERVATION if begin else SpanKind.PROMPT
            logprobs = np.zeros(n if learned else 0, np.float32)
            spans.append(Span(kind, tokens[begin : begin + n], logprobs))
            begin += n
        name = str(index)
        prompt = Prompt(name, "", "", tuple(spans[0].token_ids.tolist()), "")
        trajectory = Trajectory(name, 0, tuple(spans), Status.COMPLETED, (0, 0), 0)
        return Group(prompt, (trajectory,), (Score(0.0, False, ""),))


def load_sequences(key: str, paths: list[Path], config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> SequenceSet:
    """Read, check, write out and tokenise files of conversations, in their order. `key`: that names the files.

    Pieces are tokenised each by itself, as a policy's prompt, its answers and a tool's are in episodes.

    Raises:
        UserError: a file is missing or malformed, a row cannot be used, nothing is left, or (under `sft.overlong =
            "refuse"`) a sequence is too long.
    """
    tokens: list[npt.NDArray[np.int32]] = []
    learn: list[npt.NDArray[np.bool_]] = []
    digest = hashlib.blake2b(digest_size=16)
    count = split = truncated = dropped = 0
    for chunk in _chunks(_written(paths, config, tokenizer)):
        encoded = _encode([written for _, many in chunk for written in many], tokenizer)
        for where, many in chunk:
            count, split = count + 1, split + (len(many) > 1)
            for _ in many:
                ids, marks = next(encoded)
                if len(ids) > config.sft.max_tokens:
                    _check_length(where, len(ids), config)
                    cut = config.sft.max_tokens if config.sft.overlong == "truncate" else 0
                    ids, marks = ids[:cut], marks[:cut]
                    if not marks.any():
                        dropped += 1
                        continue
                    truncated += 1
                if not marks.any():
                    raise UserError(f"{where}: what is learned has no token")
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + marks.tobytes())
                tokens.append(ids)
                learn.append(marks)
    if not tokens:
        files = ", ".join(map(str, paths))
        why = f"in all {dropped}, what is learned begins after sft.max_tokens = {config.sft.max_tokens}; raise it"
        raise UserError(f"{key}: {files}: no sequences: {why}")
    return SequenceSet(
        tokens=np.concatenate(tokens),
        learn=np.concatenate(learn),
        ends=np.cumsum([len(ids) for ids in tokens], dtype=np.int64),
        counts=Counts(count, split, truncated, dropped),
        fingerprint=digest.hexdigest(),
    )


def _check_length(where: str, length: int, config: SftConfig) -> None:
    if config.sft.overlong == "refuse":
        raise UserError(
            f"{where}: a sequence of {length} tokens, sft.max_tokens is {config.sft.max_tokens}; raise it, or set "
            'sft.overlong = "truncate" or "drop"'
        )


def _written(
    paths: list[Path], config: SftConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[Written]]]:
    writer = Writer(config.data, tokenizer)
    for path in paths:
        where = ""
        for place, row in rows.read(path):
            where = f"{path}:{place}"
            if isinstance(row, rows.Broken):
                raise UserError(f"{where}: {row.problem}")
            try:
                yield where, writer.written(row)
            except Refused as e:
                raise UserError(f"{where}: key {e.key!r}: {e}") from e
            except RecursionError as e:
                raise UserError(f"{where}: nested too deep") from e
        if not where:
            raise UserError(f"{path}: no rows: the data set is empty")


def _chunks(rows_: Iterator[tuple[str, list[Written]]]) -> Iterator[list[tuple[str, list[Written]]]]:
    while chunk := list(itertools.islice(rows_, _CHUNK)):
        yield chunk


def _encode(
    chunk: list[Written], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """Tokens int32 [n] and marks bool [n] of each sequence."""
    pieces = [merged(written.pieces) for written in chunk]
    # A template writes its own special tokens; adding them again would double `<bos>`.
    begins = [own[0].text if not written.rendered else "" for own, written in zip(pieces, chunk, strict=True)]
    texts = [p.text for own, written in zip(pieces, chunk, strict=True) for p in own[not written.rendered :]]
    first: Any = tokenizer(begins, add_special_tokens=True)["input_ids"]
    others: Any = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    for n, (own, written) in enumerate(zip(pieces, chunk, strict=True)):
        ids: list[int] = []
        marks: list[bool] = []
        for k, piece in enumerate(own):
            new = first[n] if k == 0 and not written.rendered else next(others)
            ids += new
            marks += [piece.learn] * len(new)
        if written.ends and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
            marks.append(True)
        found = np.array(marks, np.bool_)
        found[:1] = False  # nothing predicts it
        yield np.array(ids, np.int32), found


class BatchStream(Passes):
    """The batches of all epochs. A batch lies within one epoch, whose last one may be smaller."""

    others = (
        "data.train: the conversations (or how the tokenizer's template writes them) are not those of the "
        "checkpoint; resume with the same files, or start a new run from the exported model"
    )

    def __init__(self, sequences: SequenceSet, config: SftConfig) -> None:
        super().__init__(len(sequences.lengths), config.run.seed, config.data.shuffle, sequences.fingerprint)
        self._lengths = sequences.lengths
        self._config = config

    def remaining(self) -> int:
        """Batches that are left in all epochs."""
        left = 0
        for epoch in range(self._state.epoch, self._config.sft.epochs):
            order = self._permutation(epoch)
            at = self._state.cursor if epoch == self._state.epoch else 0
            while at < len(order):
                at, left = self._end(order, at), left + 1
        return left

    def take(self) -> list[int]:
        """The sequences of the next batch, by index."""
        if self._state.cursor == len(self._order):
            self._move(self._state.epoch + 1, 0, self._state.seed)
        begin, end = self._state.cursor, self._end(self._order, self._state.cursor)
        self._move(self._state.epoch, end, self._state.seed)
        return self._order[begin:end].tolist()

    @property
    def epoch_is_over(self) -> bool:
        """Whether the batch taken last was the last of an epoch."""
        return self._state.cursor == len(self._order)

    def _end(self, order: npt.NDArray[np.int64], begin: int) -> int:
        settings = self._config.sft
        if not settings.batch_tokens:
            return min(begin + settings.batch_sequences, len(order))
        total = 0
        for at in range(begin, len(order)):
            total += int(self._lengths[order[at]])
            if total > settings.batch_tokens:
                return max(at, begin + 1)
        return len(order)
