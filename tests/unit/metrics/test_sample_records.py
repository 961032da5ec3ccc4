"""Samples as data: the pieces join to the text, the numbers are those of the engine and of the trainer."""

import json
import random

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from stare_megatron.data.tokenizer import decoder
from stare_megatron.metrics.sample_records import pieces, write_sample_records
from stare_megatron.metrics.samples import pick
from stare_megatron.types import Call, Group, Prompt, Score, Span, SpanKind, Status, Trajectory, Turn
from stare_megatron.types.token_record import TokenRecord, join
from tests import byte_tokenizer

TOKENIZER = byte_tokenizer.make()
decode = decoder(TOKENIZER)
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def ids_of(text: str) -> list[int]:
    """One token a byte."""
    return TOKENIZER.convert_tokens_to_ids(list(byte_level.pre_tokenize_str(text)[0][0]))


FIRST, SECOND = ids_of("é")


def test_pieces_join_to_the_text_and_fall_on_characters():
    assert pieces(ids_of("aé中🙂"), decode) == ["a", "", "é", "", "", "中", "", "", "", "🙂"]
    assert pieces([256, 257, *ids_of("a")], decode) == ["<|endoftext|>", "<|im_start|>", "a"]
    assert pieces([], decode) == []
    broken = [
        FIRST,
        *ids_of("a"),
        *[SECOND] * 50,
        *ids_of("b"),
    ]  # never finished; stray bytes, more than one looks back for
    assert pieces(broken, decode)[-1] == "b"
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(260) for _ in range(rng.randrange(1, 40))]
        assert "".join(pieces(ids, decode)) == decode(ids)


def test_pieces_of_decoders_that_rewrite():
    def joined(ids):  # a space between words, none at the beginning
        return " ".join(str(i) for i in ids)

    assert pieces([1, 2, 3], joined) == ["1", " 2", " 3"]
    assert "".join(pieces(range(50), lambda ids: f"{sum(ids)}!")) == f"{sum(range(50))}!"


def record(known, logprob, advantage, selected):
    known, value = np.array(known), np.array(logprob, np.float32)
    zero = np.zeros_like(value)
    return TokenRecord(
        known, value, value - np.float32(0.25), -value, np.array(advantage, np.float32), zero + 1, np.array(selected)
    )


def test_parts_of_ranks_join():
    one = record([False, True, False], [0, -0.1, 7], [0, -1, -1], [False, True, True])
    two = record([False, False, True], [3, 3, -2.3], [0, -1, -1], [False, False, False])
    whole = join([one, two])
    assert whole.known.tolist() == [False, True, True]
    assert whole.logprob.tolist() == np.array([0, -0.1, -2.3], np.float32).tolist()
    assert whole.selection.tolist() == [0, -1, 0]
    with pytest.raises(ValueError, match="know the same token"):
        join([one, one])


def test_a_line_a_trajectory(tmp_path):
    engine = np.array([-0.1, -np.inf], np.float32)
    spans = (
        Span(SpanKind.PROMPT, np.array(ids_of("A"), np.int32), np.zeros(0, np.float32)),
        Span(SpanKind.ACTION, np.array([FIRST, SECOND], np.int32), engine),
        Span(SpanKind.OBSERVATION, np.array([66, 67], np.int32), np.zeros(0, np.float32)),
        Span(SpanKind.ACTION, np.array([68], np.int32), np.array([-0.3], np.float32)),
    )
    turns = (Turn((Call("python", "1", "ok", 0.25),), void=False), Turn((), void=False))
    made = [
        Trajectory("p", i, spans, status, weight_versions=(3, 3), seed=i, turns=turns)
        for i, status in enumerate((Status.COMPLETED, Status.FAILED))
    ]
    groups = [Group(Prompt("p", "unit", "A", (65,), "é"), tuple(made), (Score(1.0, True, "n"), Score(0.0, False, "")))]
    known = [False, True, True, False, False, True]
    trained = record(
        known, [0, -0.2, -2, 0, 0, -1], [0, 0.5, 0.5, 0, 0, 0.5], [False, False, True, False, False, False]
    )
    file = write_sample_records(
        tmp_path, 10, pick(dict(enumerate(groups)), [(0, 0), (0, 1)]), {(0, 0): trained}, decode
    )
    assert file.name == "step_000010.jsonl"
    good, failed = (json.loads(line) for line in file.read_text().splitlines())
    assert (good["prompt_id"], good["sample"], good["reward"], good["correct"]) == ("p", 0, 1.0, True)
    assert (good["step"], good["note"], good["answer"], good["advantage"]) == (10, "n", "é", 0.5)
    assert [span["kind"] for span in good["spans"]] == ["prompt", "action", "observation", "action"]
    first, last = good["spans"][1], good["spans"][3]
    assert (first["token_ids"], first["pieces"]) == ([FIRST, SECOND], ["", "é"])
    assert first["rollout_logprobs"] == [-0.1, None]  # the digits of float32, not of what it widens to
    assert (first["logprobs"], first["raw_logprobs"], first["entropies"]) == ([-0.2, -2.0], [-0.45, -2.25], [0.2, 2.0])
    assert (first["selection"], last["selection"], last["logprobs"]) == ([0, 1], [0], [-1.0])
    assert "logprobs" not in good["spans"][0]
    assert good["turns"][0] == {
        "void": False,
        "calls": [{"tool": "python", "code": "1", "outcome": "ok", "seconds": 0.25}],
    }
    assert (failed["status"], failed["advantage"]) == ("failed", None)
    assert "logprobs" not in failed["spans"][1]
