import json

import pytest

from stare_megatron.errors import UserError
from stare_megatron.tasks import reasoning

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_prompts_are_few_shot_and_repeat():
    made = reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1)
    assert reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1) == made
    assert reasoning.prompts("chain_sum", SMALL, 20, 3, seed=2) != made
    for prompt in made:
        *shots, last = prompt.text.split("\n")
        assert len(shots) == 3
        assert last.endswith("Answer:")
        for shot in shots:
            question, _, answer = shot.partition(" Answer: ")
            assert eval(question.partition("problem: ")[2].removesuffix(" =")) == int(answer)


def test_questions_of_another_file_are_left_out():
    held_out = {q for p in reasoning.prompts("chain_sum", SMALL, 10, 3, seed=2) for q in reasoning.questions(p.text)}
    assert len(held_out) > 30
    made = reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1, without=held_out)
    assert len(made) == 20
    assert not held_out & {q for p in made for q in reasoning.questions(p.text)}
    assert any(held_out & reasoning.questions(p.text) for p in reasoning.prompts("chain_sum", SMALL, 20, 3, seed=1))
    everything = {
        q for p in reasoning.prompts("chain_sum", SMALL, 2000, 0, seed=3) for q in reasoning.questions(p.text)
    }
    with pytest.raises(UserError, match="of 2000 questions are none of those left out"):
        reasoning.prompts("chain_sum", SMALL, 2000, 0, seed=4, without=everything)


def test_the_scorer_decides():
    prompt = reasoning.prompts("chain_sum", SMALL, 1, 0, seed=1)[0]
    right = json.loads(prompt.answer)["entry"]["answer"]
    assert reasoning.verify(prompt.answer, f" {right}\nQuestion: more").correct
    wrong = reasoning.verify(prompt.answer, f" {int(right) + 1}")
    assert (wrong.reward, wrong.correct) == (0.0, False)
    assert right in wrong.note
    assert not reasoning.verify(prompt.answer, "").correct


@pytest.mark.parametrize(
    ("dataset", "settings", "said"), [("no_such_set", {}, "no_such_set"), ("chain_sum", {"min_termz": 2}, "min_termz")]
)
def test_mistakes_are_the_users(dataset, settings, said):
    with pytest.raises(UserError, match=said):
        reasoning.prompts(dataset, settings, 1, 0, seed=0)
