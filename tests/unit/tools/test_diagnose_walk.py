"""The entropy of a policy of the number walk, split by what its words lead to."""

from __future__ import annotations

import math

import pytest
import torch

from stare_megatron.tasks.number_walk import TASK
from stare_megatron.tasks.tiny_model import make_tokenizer
from tools import diagnose_walk
from tools.diagnose_walk import Diagnosis, parts

TOKENIZER = make_tokenizer(TASK)


def test_forks_and_slips_make_up_the_entropy():
    of = parts(torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64), [0, 1])
    assert of.fork == pytest.approx(0.8 * math.log(2))
    assert of.wrong == pytest.approx(0.2)
    whether = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert of.slip == pytest.approx(whether + 0.2 * math.log(2))


def test_a_policy_that_is_sure_has_none():
    assert parts(torch.tensor([1.0, 0.0], dtype=torch.float64), [0]) == diagnose_walk.Parts(0.0, 0.0, 0.0)


def response(text: str) -> Diagnosis:
    """Of `3 , 29 :`, under a policy that chooses evenly among four words, the one that was drawn first."""
    ids = [TOKENIZER.vocab[word] for word in text.split()]
    others = [[n for n in range(len(TOKENIZER)) if n != drawn][:3] for drawn in ids]
    p_TV = torch.zeros(len(ids), len(TOKENIZER), dtype=torch.float64)
    for row, drawn, rest in zip(p_TV, ids, others, strict=True):
        row[[drawn, *rest]] = 0.25
    return diagnose_walk._of_response(TOKENIZER, "3 , 29 :", ids, p_TV)


def test_a_right_response_has_no_entropy_after_a_slip():
    of = response("+ 7 = 10 + 7 = 17 + 7 = 24 + 7 = 31 - 4 = 27 <eos>")
    assert of.right == 0.0  # it ended before the goal
    assert of.tokens == 21
    assert of.fork + of.slip + of.after == pytest.approx(21 * math.log(4))
    of = response("* 2 = 6 + 7 = 13 * 2 = 26 + 7 = 33 - 4 = 29 <eos>")
    assert (of.right, of.after) == (1.0, 0.0)
    assert of.fork + of.slip == pytest.approx(21 * math.log(4))


def test_after_a_wrong_number_all_is_after_a_slip():
    of = response("* 2 = 7 + 7 = 14 <eos>")
    assert (of.right, of.tokens) == (0.0, 9)
    assert of.after == pytest.approx(5 * math.log(4))
    assert of.wrong["number"] == pytest.approx(1.0)  # none of the four is right
    assert of.wrong["equals"] == pytest.approx(0.75)
