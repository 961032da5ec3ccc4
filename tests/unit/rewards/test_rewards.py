import asyncio
import dataclasses

import numpy as np
import pytest

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards import RewardError, check_prompts, make_reward
from stare_megatron.rewards.base import response_text
from stare_megatron.tasks import reasoning
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import Prompt, Span, SpanKind, Status, Trajectory

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))
PROMPT = Prompt("p", "s", "7 8 3 12 :", (1, 19, 20, 15, 24, 5), "30")
RIGHT = "7 + 8 = 15 15 + 3 = 18 18 + 12 = 30"


def trajectory(*spans: tuple[SpanKind, list[int]], status: Status = Status.COMPLETED) -> Trajectory:
    made = [Span(SpanKind.PROMPT, np.array(PROMPT.token_ids, np.int32), np.zeros(0, np.float32))]
    for kind, ids in spans:
        count = len(ids) if kind is SpanKind.ACTION else 0
        made.append(Span(kind, np.array(ids, np.int32), np.zeros(count, np.float32)))
    return Trajectory("p", 0, tuple(made), status, weight_versions=(0, 0), seed=0)


def written(text: str, tail: tuple[int, ...] = (2,), status: Status = Status.COMPLETED) -> Trajectory:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return trajectory((SpanKind.ACTION, [*ids, *tail]), status=status)


class Text:
    """A tokenizer for rewards of free text: decodes every trajectory to one string."""

    eos_token_id = 2

    def __init__(self, text: str) -> None:
        self._text = text

    def decode(self, ids, skip_special_tokens):
        return self._text


def test_unknown_reward_names_the_nearest():
    with pytest.raises(UserError, match=r"reward.name = 'maths' is not registered \(did you mean 'math'\?\)"):
        make_reward(RewardConfig(name="maths"))


def test_response_text_is_what_the_policy_wrote():
    t = trajectory((SpanKind.ACTION, [15, 4]), (SpanKind.OBSERVATION, [99]), (SpanKind.ACTION, [16, 2]))
    assert response_text(t, TOKENIZER, skip_special_tokens=False) == "3 + 4"


@pytest.mark.parametrize(
    ("t", "right"),
    [
        (written(RIGHT), True),
        (written(RIGHT, tail=()), True),  # ended by itself: a stop string may have ended it
        (written(RIGHT, tail=(), status=Status.TRUNCATED), False),
        (written(RIGHT, tail=(2, 2)), False),
        (written(RIGHT, tail=(0, 2)), False),
        (written("8 + 7 = 16 16 + 3 = 19 19 + 12 = 31"), False),
        (trajectory((SpanKind.ACTION, [2])), False),
    ],
)
def test_order_free_sum(t, right):
    score = asyncio.run(make_reward(RewardConfig(name="order_free_sum"))(PROMPT, t, TOKENIZER))
    assert (score.correct, score.reward) == (right, float(right))
    assert bool(score.note) is not right


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("12", " 12\n", True),
        ("12", "3 + 9 = 12", True),
        ("12", "12 then 13", False),
        ("12", "112", False),
        ("12", "", False),
        ("1200", "it is 1,200.", True),
        ("-4", "so -4", True),
        ("4", "7-4", True),
        ("0.5", ".5 or 0.50", True),
        ("yes", " yes ", True),
        ("yes", "yes 1", False),
        ("", "", False),
        ("  ", "\n", False),
        ("1e+17", "It is 100000000000000000.", True),
        ("100000000000000000", "It is 1e+17.", True),
        ("1e+17", "It is 10000000000000000.", False),
        ("$18", "It is $18.", True),
        ("18", "It is $18", True),
        ("-$18", "so -$18", True),
        ("$18", "It is $19.", False),
        ("+5", "It is 5.", True),
        ("5", "It is +5.", True),
        ("5", "It is -5.", False),
        ("-5", "It is \N{MINUS SIGN}5", True),
        ("12", "１２", True),
        ("1e400", "1e400", True),
        ("1e400", "1e401", False),
        ("7", "9" * 50_000 + " 7", True),
        ("7", "9" * 50_000, False),
        ("1,234", "1234", True),
        ("1234", "12,34", False),
    ],
)
def test_exact(answer, text, right):
    prompt = dataclasses.replace(PROMPT, answer=answer)
    assert asyncio.run(make_reward(RewardConfig(name="exact"))(prompt, written("1"), Text(text))).correct is right


FOREIGN = [
    "<|im_start|>user\n1 2 3 4 :<|im_end|>\n",
    "What is 2 + 2?",
    "",
    ":",
    "1",
    "1 2 3",
    "0 , :",
    "²3 4 :",
    "9" * 5000 + " 1 :",
]


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_generated_task_refuses_prompts_it_did_not_write(name):
    task, reward = tasks.get(name), make_reward(RewardConfig(name=name))
    config, mine = RewardConfig(name=name), task.prompts("train", 20, seed=1)
    made = [Prompt(p.id, "s", p.text, (1,), p.answer) for p in mine]
    check_prompts(config, made, "train.jsonl")
    wrong = [dataclasses.replace(made[0], answer=answer) for answer in ("", "7", made[0].answer + " ", "x")]
    for prompt in [dataclasses.replace(made[0], text=text) for text in FOREIGN] + wrong:
        with pytest.raises(
            UserError, match=rf"train.jsonl: prompt '{made[0].id}': reward.name = '{name}' cannot grade"
        ):
            check_prompts(config, [*made[1:], prompt], "train.jsonl")
        with pytest.raises(RewardError):
            asyncio.run(reward(prompt, written("1"), TOKENIZER))


def test_a_prompt_is_checked_once_for_all_its_answers(monkeypatch):
    kind, checked = type(tasks.get("order_free_sum")), []
    real = kind.check

    def check(task, text, answer):
        checked.append(text)
        real(task, text, answer)

    monkeypatch.setattr(kind, "check", check)
    reward = make_reward(RewardConfig(name="order_free_sum"))
    for text, right in ((RIGHT, True), ("7 + 8 = 16", False), (RIGHT, True)):
        assert asyncio.run(reward(PROMPT, written(text), TOKENIZER)).correct is right
    assert len(checked) == 1
    for _ in range(2):
        with pytest.raises(RewardError):
            asyncio.run(reward(dataclasses.replace(PROMPT, answer="31"), written(RIGHT), TOKENIZER))


def test_prompts_for_reasoning_gym_are_its_own():
    made = reasoning.prompts("chain_sum", {}, 2, 0, seed=1)
    config = RewardConfig(name="reasoning_gym")
    check_prompts(config, [Prompt(p.id, "s", p.text, (1,), p.answer) for p in made], "a.jsonl")
    with pytest.raises(
        UserError, match=r"a.jsonl: prompt 'p': reward.name = 'reasoning_gym' cannot grade it: tools/make"
    ):
        check_prompts(config, [PROMPT], "a.jsonl")


def test_a_users_reward_checks_its_prompts(tmp_path):
    (tmp_path / "own.py").write_text(
        "from stare_megatron.rewards import RewardKind, text_reward\n"
        "import dataclasses\n"
        "def check(prompt):\n"
        "    if not prompt.answer.isdigit(): raise ValueError('want a number as answer')\n"
        "REWARD = dataclasses.replace(text_reward(lambda prompt, text: 0.0), check=check)\n"
    )
    config = RewardConfig(name=f"{tmp_path / 'own.py'}:REWARD")
    check_prompts(config, [PROMPT], "a.jsonl")
    with pytest.raises(UserError, match="want a number as answer"):
        check_prompts(config, [dataclasses.replace(PROMPT, answer="x")], "a.jsonl")
