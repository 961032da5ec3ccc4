"""What the tool wrote has no part in the objective: no loss, no surprisal, no entropy, in any method or metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stare_megatron.algo import dynamics
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import Candidates, ScoredCandidates
from stare_megatron.config import AlgorithmConfig, TrainerConfig
from stare_megatron.data.packing import plan_updates
from stare_megatron.trainer.model_runner import RankBatch, rank_batch
from stare_megatron.trainer.partials import NO_TARGET
from stare_megatron.trainer.scoring import SampledBatch, Scored, candidates
from stare_megatron.trainer.sequence import SequenceLayout, token_batch
from stare_megatron.types import Control, Group, Prompt, Score, Scores, SequenceCost, Span, SpanKind, Status, Trajectory

NONE = np.empty(0, np.float32)
ACTION, OBSERVATION = SpanKind.ACTION, SpanKind.OBSERVATION
TOOL = 7  # every observation token; no action has it
OPEN = Control(True, 1.5, 0.5, 0.2, 0.3, 0.004)


def group(observation: int, seed: int) -> Group:
    """Four trajectories of up to four turns; `observation`: tokens of each tool's answer, 0 for none."""
    rng = np.random.default_rng(seed)
    prompt = Prompt(f"p{seed}", "s", "", (1, 2, 3), "")
    trajectories = []
    for sample in range(4):
        spans = [Span(SpanKind.PROMPT, np.array(prompt.token_ids, np.int32), NONE)]
        for turn in range(1 + sample):
            if turn and observation:
                spans.append(Span(OBSERVATION, np.full(observation + turn, TOOL, np.int32), NONE))
            n = int(rng.integers(1, 9))
            spans.append(Span(ACTION, rng.integers(10, 99, n).astype(np.int32), -rng.random(n).astype(np.float32)))
        trajectories.append(Trajectory(prompt.id, sample, tuple(spans), Status.COMPLETED, (0, 0), 0))
    scores = tuple(Score(float(x), False, "") for x in (1.0, 0.0, 0.0, 1.0))
    return Group(prompt, tuple(trajectories), scores)


def load(observation: int, config: AlgorithmConfig) -> RankBatch:
    groups = [group(observation, seed) for seed in range(3)]
    trainer = TrainerConfig(micro_batch_tokens=64)
    ((share,),) = plan_updates([g.summary() for g in groups], trainer, SequenceCost(1.0, 0.0))
    batch = token_batch(groups, share, ALGORITHMS[config.method], config, torch.device("cpu"))
    return rank_batch(batch, share, SequenceLayout(1, 1, 0), config)


def scored(data: RankBatch, garbage: float) -> Scored:
    """Made-up scores on actions, `garbage` elsewhere."""
    count = int(data.batch.action_T.sum())
    columns = []
    for seed in range(3):
        column_T = torch.full((data.batch.token_ids_T.shape[0],), garbage)
        column_T[data.batch.action_T] = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 2 + 0.1
        columns.append(column_T)
    return Scored(Scores(-columns[0], columns[1], columns[2] - 1), -columns[0])


@pytest.mark.parametrize("method", ALGORITHMS)
def test_weights_and_factors_do_not_depend_on_observations(method):
    config = AlgorithmConfig.model_validate({"method": method}).model_copy(update={"response_tokens": 64})
    seen = []
    for observation, garbage in ((0, 0.0), (5, 0.0), (5, 1e4), (5, -1e4), (40, 3.0)):
        data = load(observation, config)
        own_T = data.batch.action_T
        assert bool(own_T.all()) is False
        assert data.owned_T.equal(own_T)
        weights = ALGORITHMS[method].weigh(candidates([data], [scored(data, garbage)]), OPEN, config, OneRank())
        assert not weights.selection.selected_T[~own_T].any()
        seen.append(
            (
                weights.weight_T[own_T],
                weights.selection.selected_T[own_T],
                data.factor_T[own_T],
                data.batch.advantage_T[own_T],
                data.batch.token_ids_T[own_T],
            )
        )
    for other in seen[1:]:
        for got, want in zip(other, seen[0], strict=True):
            assert got.equal(want)


def test_the_rollouts_surprisal_is_that_of_actions():
    config = AlgorithmConfig.model_validate({"method": "stare", "stare": {"fraction": 0.2}})
    chosen = []
    for observation in (0, 5, 40):
        data = load(observation, config)
        tokens = SampledBatch(data).tokens()
        own_T = data.batch.action_T
        assert tokens.action_T.equal(own_T)
        loud = Candidates(
            torch.where(own_T, tokens.surprisal_T, 1e4), tokens.advantage_T, tokens.action_T, tokens.global_id_T
        )
        for candidate in (tokens, loud):
            selected_T = ALGORITHMS["stare"].weigh(candidate, OPEN, config, OneRank()).selection.selected_T
            chosen.append(data.batch.token_ids_T[selected_T])
    assert len(chosen[0]) > 5
    assert all(c.equal(chosen[0]) for c in chosen)


def test_dynamics_are_those_of_actions():
    config = AlgorithmConfig.model_validate({"method": "stare", "stare": {"fraction": 0.2}})
    totals = []
    for observation, garbage in ((0, 0.0), (5, 1e4), (40, -2.0)):
        data = load(observation, config)
        tokens = candidates([data], [scored(data, garbage)])
        assert isinstance(tokens, ScoredCandidates)
        weights = ALGORITHMS["stare"].weigh(tokens, OPEN, config, OneRank())
        exact_T = dynamics.exact_set(tokens, 0.2, OneRank())
        assert not exact_T[~data.batch.action_T].any()
        applied = dynamics.Applied(weights.weight_T, weights.selection.selected_T)
        totals.append(dynamics.measure(tokens, applied, exact_T, OneRank()).tolist())
    assert totals[0] == totals[1] == totals[2]


def test_no_row_asks_for_an_observation():
    data = load(5, AlgorithmConfig())
    targets = torch.cat([row.target_P for row in data.rows])
    assert TOOL in torch.cat([row.token_ids_1P[0] for row in data.rows])  # it is read, as context
    assert TOOL not in targets
    assert int((targets != NO_TARGET).sum()) == data.batch.num_action_tokens == int(data.batch.action_T.sum())
    assert data.batch.rollout_logprob_T[~data.batch.action_T].eq(0).all()


def test_lengths_that_rewards_and_denominators_count_are_those_of_actions():
    with_tool, without = group(40, 0), group(0, 0)
    assert with_tool.summary().num_action_tokens == without.summary().num_action_tokens
    assert with_tool.summary().num_tokens != without.summary().num_tokens
    assert [e.observation_tokens for e in with_tool.summary().episodes] == [0, 41, 41 + 42, 41 + 42 + 43]
    assert [e.turns for e in with_tool.summary().episodes] == [1, 2, 3, 4]
