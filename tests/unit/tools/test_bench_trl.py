"""What TRL's trainer is given beside a run, without TRL."""

from __future__ import annotations

import pytest

from stare_megatron.types import Prompt
from tests import byte_tokenizer
from tests.configs import configuration
from tools import bench_trl

TOKENIZER = byte_tokenizer.make()


def test_the_runs_reward_grades_what_trl_sampled() -> None:
    prompts = [Prompt(f"p{i}", "s", "Hi", tuple(TOKENIZER.encode("Hi")), answer) for i, answer in enumerate("47")]
    graded = bench_trl.Graded(configuration(reward={"name": "exact"}), prompts, TOKENIZER)
    right = [*TOKENIZER.encode("7"), TOKENIZER.eos_token_id]
    assert graded(completion_ids=[right, right], row=[0, 1], completions=["7", "7"]) == [0.0, 1.0]
    assert (graded.tokens, graded.reward) == (2 * len(right), 0.5)
    assert graded.__name__ == "exact"


def test_what_trl_has_no_counterpart_for_is_refused() -> None:
    once = {"dynamic_sampling": False}
    bench_trl.refuse(configuration(rollout=once))
    with pytest.raises(SystemExit, match=r"not with rollout\.dynamic_sampling = true"):
        bench_trl.refuse(configuration())
    with pytest.raises(SystemExit, match=r"not with rollout\.stop"):
        bench_trl.refuse(configuration(rollout=once | {"stop": ["x"]}))
    with pytest.raises(SystemExit, match=r"not with sampling\.mode = 'one_step'"):
        bench_trl.refuse(
            configuration(
                rollout=once,
                sampling={"mode": "one_step"},
                inference={"placement": "separate"},
                algorithm={"correction": {"mode": "truncate"}},
            )
        )
