"""Episodes, groups and the collector on an in-memory sampler."""

import asyncio
import dataclasses
import json
import random

import numpy as np
import pytest

from stare_megatron import tasks
from stare_megatron.config import DataConfig, parse
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.envs.base import End, EnvError
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.metrics.catalogue import by_name
from stare_megatron.metrics.reduce import reduce
from stare_megatron.rewards.base import RewardError
from stare_megatron.rollout.collect import Collector, measure
from stare_megatron.rollout.episode import run_episode, run_group
from stare_megatron.rollout.sampler import SampleError
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import (
    Completion,
    EpisodeCounts,
    GroupRequest,
    GroupSummary,
    Measured,
    Prompt,
    Sampling,
    Score,
    SpanKind,
    Status,
    Turn,
)

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))
PROMPT = Prompt("p", "s", "3 9 :", (1, 15, 21, 5), "12")
SAMPLING = Sampling(max_tokens=8, temperature=1.0, top_p=1.0, stop=(), seed=0)


class Sampler:
    """Answers with two tokens drawn from the seed; remembers what it was asked."""

    version = 5

    def __init__(self, status=Status.COMPLETED, fail=frozenset()):
        self.asked: list[tuple[list[int], Sampling]] = []
        self.running = self.most = 0
        self._status = status
        self._fail = fail

    async def sample(self, token_ids, sampling):
        self.asked.append((list(token_ids), sampling))
        if len(self.asked) in self._fail:
            raise SampleError("no slot")
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        rng = random.Random(sampling.seed)
        ids = np.array([12 + rng.randrange(50), 2], np.int32)
        routed = np.full((len(token_ids) + 1, 2, 1), len(self.asked), np.uint8)
        return Completion(ids, np.array([-0.5, -0.1], np.float32), self._status, self.version, routed)


class Echo:
    """Two turns: answers the first action with two tokens that no text encodes to together."""

    stop = ("</call>",)
    turns = (Turn((), void=False),)

    def __init__(self, prompt, observation=(3, 3), fails=False):
        self._prompt = prompt
        self._observation = observation
        self._fails = fails
        self.count = self.closed = 0

    async def reset(self):
        return np.array(self._prompt.token_ids, np.int32)

    async def step(self, action):
        self.count += 1
        if self._fails:
            raise EnvError("sandbox gone")
        return np.array(self._observation, np.int32) if self.count == 1 else End(Status.COMPLETED)

    async def close(self):
        self.closed += 1


def play(env, sampler, sampling=SAMPLING):
    return asyncio.run(run_episode(PROMPT, 3, env, sampler, sampling))


def test_single_turn_keeps_the_sampled_ids():
    sampler = Sampler()
    trajectory, note = play(SingleTurn(PROMPT), sampler)
    assert [s.kind for s in trajectory.spans] == [SpanKind.PROMPT, SpanKind.ACTION]
    assert trajectory.token_ids().tolist() == [*PROMPT.token_ids, 12 + random.Random(0).randrange(50), 2]
    assert trajectory.rollout_logprobs().tolist() == pytest.approx([0, 0, 0, 0, -0.5, -0.1])
    assert (trajectory.status, trajectory.weight_versions, trajectory.sample, note) == (Status.COMPLETED, (5, 5), 3, "")


def test_experts_are_those_of_the_last_request():
    """Which began with all tokens before, so that it read them too."""
    trajectory, _ = play(Echo(PROMPT), Sampler())
    assert trajectory.routed_experts is not None
    assert trajectory.routed_experts.shape == (trajectory.num_tokens - 1, 2, 1)
    assert (trajectory.routed_experts == 2).all()


def test_turns_continue_the_exact_stream_under_one_budget():
    sampler, env = Sampler(), Echo(PROMPT)
    trajectory, _ = play(env, sampler)
    kinds = [s.kind for s in trajectory.spans]
    assert kinds == [SpanKind.PROMPT, SpanKind.ACTION, SpanKind.OBSERVATION, SpanKind.ACTION]
    (first, _), (second, sampling) = sampler.asked
    assert first == list(PROMPT.token_ids)
    assert second == trajectory.token_ids()[:-2].tolist()  # prompt, action, observation: nothing re-encoded
    assert sampling.max_tokens == 8 - 2 - 2
    assert sampling.seed == derive_seed(SAMPLING.seed, 1)
    assert sampling.stop == ("</call>",)
    assert trajectory.turns == env.turns
    assert trajectory.action_mask().tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
    assert env.closed == 1


def test_an_observation_without_room_after_it_truncates():
    trajectory, _ = play(Echo(PROMPT), Sampler(), dataclasses.replace(SAMPLING, max_tokens=4))
    assert trajectory.status is Status.TRUNCATED
    assert [s.kind for s in trajectory.spans] == [SpanKind.PROMPT, SpanKind.ACTION]
    longer, _ = play(Echo(PROMPT), Sampler(), dataclasses.replace(SAMPLING, max_tokens=5))
    assert longer.status is Status.COMPLETED


@pytest.mark.parametrize("status", [Status.TRUNCATED, Status.FAILED])
def test_a_completion_that_did_not_end_is_not_shown_to_the_environment(status):
    env = Echo(PROMPT)
    trajectory, _ = play(env, Sampler(status))
    assert (trajectory.status, env.count, env.closed) == (status, 0, 1)


def test_known_failures_are_data():
    env = Echo(PROMPT, fails=True)
    trajectory, note = play(env, Sampler())
    assert (trajectory.status, note, env.closed) == (Status.FAILED, "EnvError: sandbox gone", 1)
    trajectory, note = play(SingleTurn(PROMPT), Sampler(fail={1}))
    assert (trajectory.status, note, len(trajectory.spans)) == (Status.FAILED, "SampleError: no slot", 1)
    assert trajectory.weight_versions == (5, 5)


def group(sampler, reward, size=4, make_env=SingleTurn):
    request = GroupRequest(0, PROMPT, size, dataclasses.replace(SAMPLING, seed=11))
    return asyncio.run(run_group(request, make_env=make_env, sampler=sampler, reward=reward, tokenizer=TOKENIZER))


async def token_reward(prompt, trajectory, tokenizer):
    value = float(trajectory.token_ids()[-2])
    return Score(value, value > 30, "")


def test_a_group_samples_all_at_once_with_seeds_of_its_own():
    sampler = Sampler()
    made = group(sampler, token_reward)
    assert sampler.most == 4
    assert [t.sample for t in made.trajectories] == [0, 1, 2, 3]
    assert [t.seed for t in made.trajectories] == [derive_seed(11, i) for i in range(4)]
    assert [s.reward for s in made.scores] == [float(t.token_ids()[-2]) for t in made.trajectories]
    assert len({s.reward for s in made.scores}) > 1


def test_what_a_reward_reports_of_each_trajectory_is_reduced():
    async def reward(prompt, trajectory, tokenizer):
        found = (Measured("user/mean/x", trajectory.sample), Measured("user/max/x", trajectory.sample))
        return Score(1.0, True, "", measured=found)

    summary = group(Sampler(), reward).summary()
    assert by_name(reduce(summary.measured)) == {"user/mean/x": 1.5, "user/max/x": 3}
    assert set(summary.measured) <= set(measure(summary, "s"))


def test_seeds_are_the_same_everywhere():
    # Recorded: a change would make resumed runs differ from uninterrupted ones.
    assert derive_seed(0) == 4761921975702974394
    assert derive_seed(11, 3) == 3130564620093163177
    assert len({derive_seed(a, b) for a in range(100) for b in range(100)}) == 10_000
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_failures_in_a_group_score_zero_with_a_note():
    async def reward(prompt, trajectory, tokenizer):
        if trajectory.sample == 1:
            raise RewardError("worker died")
        return Score(1.0, True, "")

    made = group(Sampler(fail={3}), reward)
    assert [s.reward for s in made.scores] == [1.0, 0.0, 0.0, 1.0]
    assert made.scores[1].note == "not graded: worker died"
    assert made.scores[2].note == "SampleError: no slot"
    assert [t.status for t in made.trajectories].count(Status.FAILED) == 1


def test_bugs_propagate_as_themselves():
    async def reward(prompt, trajectory, tokenizer):
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError, match="bug"):
        group(Sampler(), reward)


class Dispatcher:
    """Scores requests by a rule on the prompt's number; a reference is the request's (order, seed)."""

    def __init__(self, rewards, shuffle=0):
        self._rewards = rewards
        self._rng = random.Random(shuffle)
        self._waiting: list[GroupRequest] = []
        self.requests: list[GroupRequest] = []
        self.most = 0

    def submit(self, requests):
        requests = list(requests)
        self._waiting += requests
        self.requests += requests
        self.most = max(self.most, len(self._waiting))

    def results(self):
        while self._waiting:
            r = self._waiting.pop(self._rng.randrange(len(self._waiting)))
            rewards = self._rewards(int(r.prompt.text.split()[0]))
            n = len(rewards)
            status = tuple(Status.TRUNCATED if x < 0 else Status.COMPLETED for x in rewards)
            summary = GroupSummary(
                r.prompt.id,
                r.prompt.source,
                rewards,
                tuple(x == 1 for x in rewards),
                (9,) * n,
                tuple(range(1, n + 1)),
                status,
                (0,) * n,
                (True,) * n,
                tuple(range(n)),
                0,
            )
            yield r, (r.order, r.sampling.seed), summary


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i} :", "answer": "1", "id": str(i)} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return PromptStream(load_prompts(DataConfig(train=[path]), TOKENIZER), seed=0, shuffle=False)


def collector(dispatcher, stream, **rollout):
    tree = {
        "run": {"steps": 1, "seed": 3},
        "model": {"path": "m"},
        "data": {"train": ["p"]},
        "reward": {"name": "exact"},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_refills": 2} | rollout,
    }
    return Collector(parse(tree, "test"), dispatcher, stream)


def values(got):
    return by_name(reduce(got.measured))


MIXED, SOLVED, FAILED = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def every_third_mixed(n):
    return MIXED if n % 3 == 0 else SOLVED if n % 3 == 1 else FAILED


def test_zero_variance_groups_are_replaced_one_by_one(stream):
    dispatcher = Dispatcher(every_third_mixed)
    got = collector(dispatcher, stream).collect(0)
    assert [s.prompt_id for _, s in got.groups] == ["0", "3", "6", "9"]
    assert [r.order for r in dispatcher.requests] == list(range(10))
    assert [s.prompt_id for s in got.sampled] == [str(n) for n in range(10)]
    assert dispatcher.most == 4
    v = values(got)
    assert (v["groups/sampled"], v["groups/dropped"], v["groups/zero_variance_kept"]) == (10, 6, 0)
    assert (v["groups/all_correct"], v["groups/none_correct"]) == (3, 3)
    assert (v["groups/all_correct_ratio"], v["groups/none_correct_ratio"]) == (3 / 10, 3 / 10)
    assert (v["reward/mean"], v["reward/correct"]) == (0.5, 0.5)
    assert (v["response/length_mean"], v["response/length_max"], got.tokens_sampled) == (1.5, 2, 30)


@pytest.mark.parametrize("shuffle", range(20))
def test_no_useful_group_is_sampled_and_thrown_away(stream, shuffle):
    """Whatever the order in which groups end and the share of useful ones: exactly as many prompts as are needed."""
    rng = random.Random(shuffle)
    useful = [rng.random() < rng.choice([0.1, 0.5, 0.9]) for _ in range(80)]
    dispatcher = Dispatcher(lambda n: MIXED if useful[n] else FAILED, shuffle)
    got = collector(dispatcher, stream, max_refills=19).collect(0)
    needed = [n for n in range(80) if useful[n]][:4]
    assert [s.prompt_id for _, s in got.groups] == [str(n) for n in needed]
    assert len(dispatcher.requests) == needed[-1] + 1 == stream.state().cursor
    assert dispatcher.most == 4


def test_refills_are_bounded_and_then_dropped_groups_fill_up_in_order(stream):
    dispatcher = Dispatcher(lambda n: MIXED if n in (2, 9) else FAILED)
    got = collector(dispatcher, stream).collect(0)
    assert len(dispatcher.requests) == 4 + 2 * 4
    assert [s.prompt_id for _, s in got.groups] == ["0", "1", "2", "9"]
    v = values(got)
    assert (v["groups/sampled"], v["groups/zero_variance_kept"], v["groups/dropped"]) == (12, 2, 8)
    assert (v["reward/mean"], v["reward/kept_mean"]) == (2 / 24, 2 / 8)  # over all sampled, and only the kept
    assert len(collector(Dispatcher(lambda n: FAILED), stream, max_refills=0).collect(1).sampled) == 4


def test_without_dynamic_sampling_everything_is_kept(stream):
    got = collector(Dispatcher(lambda n: FAILED), stream, dynamic_sampling=False).collect(0)
    assert [s.prompt_id for _, s in got.groups] == ["0", "1", "2", "3"]
    v = values(got)
    assert (v["groups/sampled"], v["groups/zero_variance_kept"], v["groups/dropped"]) == (4, 4, 0)


def test_truncated_share_counts_trajectories(stream):
    got = collector(Dispatcher(lambda n: (1.0, -1.0) if n % 2 else MIXED), stream).collect(0)
    assert values(got)["response/truncated"] == 0.25


def test_a_step_that_nothing_finished_for_counts_none(stream):
    """In a stream all of a batch may have been finished, and counted, when the batch before was drawn."""
    of = collector(Dispatcher(lambda n: MIXED), stream)
    got = of.collect(0)
    v = values(of.collected(1, got.groups, [], 0, 1.0))
    ends = [f"response/{name}" for name in ("failed", "ungraded", "inexact")]
    assert [v[name] for name in ("groups/sampled", "groups/all_correct", "groups/none_correct", *ends)] == [0] * 6
    assert "reward/mean" not in v
    assert v["reward/kept_mean"] == 0.5


def test_turns_and_calls_are_counted_over_all_sampled(stream):
    class Tools(Dispatcher):
        def results(self):
            for i, (request, ref, summary) in enumerate(super().results()):
                episodes = (EpisodeCounts(3, 2, 1, 0.5, 40, False), EpisodeCounts(1, 0, 0, 0.0, 0, i == 0))
                statuses = (Status.OVERLONG, Status.INEXACT if i == 1 else Status.COMPLETED)
                yield request, ref, dataclasses.replace(summary, statuses=statuses, episodes=episodes)

    v = values(collector(Tools(lambda n: MIXED), stream, dynamic_sampling=False).collect(0))
    names = ("turns", "calls", "call_errors", "seconds", "seconds_max", "observation_tokens", "void")
    assert [v[f"tools/{name}"] for name in names] == [2.0, 1.0, 0.5, 0.25, 0.5, 20.0, 1 / 8]
    assert (v["response/inexact"], v["response/truncated"]) == (1, 0.5)


def test_calls_without_any_call_have_no_errors(stream):
    class Silent(Dispatcher):
        def results(self):
            for request, ref, summary in super().results():
                yield request, ref, dataclasses.replace(summary, episodes=(EpisodeCounts(1, 0, 0, 0.0, 0, False),) * 2)

    v = values(collector(Silent(lambda n: MIXED), stream, dynamic_sampling=False).collect(0))
    assert (v["tools/turns"], v["tools/calls"], v["tools/call_errors"]) == (1.0, 0.0, 0.0)


def test_the_batch_does_not_depend_on_completion_order(stream):
    start = stream.state()
    runs = []
    for shuffle in range(5):
        stream.restore(start)
        got = collector(Dispatcher(every_third_mixed, shuffle), stream).collect(2)
        runs.append((got, stream.state()))
    assert all(run == runs[0] for run in runs)


def test_request_seeds_differ_between_steps_and_orders(stream):
    dispatcher = Dispatcher(lambda n: MIXED)
    c = collector(dispatcher, stream)
    c.collect(0)
    c.collect(1)
    seeds = [r.sampling.seed for r in dispatcher.requests]
    assert len(set(seeds)) == 8
    assert seeds[:4] == [derive_seed(3, 0, order) for order in range(4)]


def test_failed_samples_do_not_make_a_group_informative():
    def summary(*samples: tuple[float, Status]) -> GroupSummary:
        rewards, statuses = zip(*samples, strict=True)
        n = len(samples)
        return GroupSummary(
            "p", "s", rewards, (False,) * n, (4,) * n, (2,) * n, statuses, (0,) * n, (True,) * n, (0,) * n, 0
        )

    done, failed = Status.COMPLETED, Status.FAILED
    assert summary((1.0, done), (1.0, done), (0.0, failed)).zero_variance
    assert summary((1.0, done), (0.0, failed)).zero_variance
    assert not summary((1.0, done), (0.0, done), (0.0, failed)).zero_variance
