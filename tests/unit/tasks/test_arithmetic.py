import operator

import pytest

from stare_megatron.errors import UserError
from stare_megatron.tasks import arithmetic

OPERATIONS = {"+": operator.add, "*": operator.mul}


def test_prompts_end_in_an_open_problem_after_four_solved_ones():
    for split in ("train", "eval", "test"):
        for prompt in arithmetic.prompts(split, 300, 0):
            *shots, last = prompt.text.split("\n")
            assert len(shots) == 4
            for shot in shots:
                a, op, b, equals, c = shot.split(" ")
                assert (equals, OPERATIONS[op](int(a), int(b))) == ("=", int(c))
                assert (int(a), op, int(b)) in arithmetic.problems("train")
                assert not shot.startswith(last)
            a, op, b, equals = last.split(" ")
            assert (equals, str(OPERATIONS[op](int(a), int(b)))) == ("=", prompt.answer)
            assert (int(a), op, int(b)) in arithmetic.problems(split)


def test_splits_are_disjoint_whatever_the_order_of_terms():
    splits = [set(arithmetic.problems(split)) for split in ("train", "eval", "test")]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 200
    for split in splits:
        assert {(b, op, a) for a, op, b in split} == split


def test_prompts_repeat_and_have_unique_ids():
    prompts = arithmetic.prompts("train", 300, 0)
    assert arithmetic.prompts("train", 300, 0) == prompts
    assert arithmetic.prompts("train", 300, 1) != prompts
    assert len({p.id for p in prompts}) == 300
    with pytest.raises(UserError, match="0 prompts"):
        arithmetic.prompts("train", 0, 0)
