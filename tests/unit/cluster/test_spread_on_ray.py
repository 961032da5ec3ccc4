"""Groups in parts on a real local Ray: the engines' actors as they are, but for the engine and its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from stare_megatron.cluster import runtime
from stare_megatron.cluster.dispatch import Dispatch, Limits
from stare_megatron.cluster.doing import ray_actor
from stare_megatron.cluster.engine_actor import EngineActor
from stare_megatron.cluster.fleet import Fleet
from stare_megatron.config import InferenceConfig
from stare_megatron.errors import EngineLostError
from stare_megatron.types import (
    Group,
    GroupRequest,
    GroupSummary,
    Prompt,
    Sampling,
    Score,
    Span,
    SpanKind,
    Status,
    Trajectory,
)

SIZE, SHORT = 5, 16


def group(request: GroupRequest, samples: Sequence[int]) -> Group:
    """Tokens and rewards that depend on the prompt and the sample alone, as seeds have it."""
    made = []
    for n in samples or range(request.group_size):
        drawn = np.random.default_rng((request.sampling.seed, n)).integers(3, 99, n + 1).astype(np.int32)
        prompt = Span(SpanKind.PROMPT, np.asarray(request.prompt.token_ids, np.int32), np.zeros(0, np.float32))
        action = Span(SpanKind.ACTION, drawn, -drawn.astype(np.float32), ((0, n + 1),))
        made.append(Trajectory(request.prompt.id, n, (prompt, action), Status.COMPLETED, (0, 0), seed=n))
    scores = tuple(Score(float(t.token_ids()[-1]), bool(t.sample % 2), "") for t in made)
    return Group(request.prompt, tuple(made), scores)


pytestmark = [pytest.mark.parts, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def actors(local_ray, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    made: Any = EngineActor
    base: Any = made.__ray_metadata__.modified_class
    of_group = group

    class Scripted(base):
        async def start(self) -> None:
            async def run(request: GroupRequest, samples: Sequence[int] = ()) -> tuple[Group, GroupSummary]:
                found = of_group(request, samples)
                return found, found.summary(tuple(t.sample for t in found.trajectories))

            self._run = run

    config = SimpleNamespace(cluster=SimpleNamespace(address="local"))
    logs: Path = tmp_path_factory.mktemp("logs")
    started = [ray_actor(Scripted).options(num_cpus=0).remote(config, i, "gloo", None, [], logs) for i in range(2)]
    ray.get([actor.start.remote() for actor in started])
    return started


@pytest.mark.parametrize("limit", [0, SHORT])
def test_spread_groups_are_what_one_engine_would_have_made(actors: list[Any], limit: int) -> None:
    fleet = Fleet(InferenceConfig(engines=2), pushes=True)
    fleet.pushed(range(2), 0, 0.0)
    keeper: Any = SimpleNamespace(fleet=fleet, actors=actors, require=lambda: None, tick=lambda: False)
    lookout: Any = SimpleNamespace(answered=lambda *_: None, look=lambda *_: None)
    crew = runtime.Crew(["0", "1"], lambda _: None, named_hosts=False, lost=EngineLostError, lookout=lookout)
    dispatcher = Dispatch(keeper, crew, Limits(64, spread_below=limit, longest_first=True))
    sampling = Sampling(8, 1.0, 1.0, (), 5)
    prompts = [Prompt(f"p{n}", "s", "q", (7,) * length, "a") for n, length in enumerate((SHORT - 1, SHORT, 3))]
    requests = [GroupRequest(n, prompt, SIZE, sampling) for n, prompt in enumerate(prompts)]
    dispatcher.submit(requests)
    flying = len(dispatcher._flying)
    assert flying == (5 if limit else 3)
    got = list(dispatcher.results(lambda _: None, lambda: None))
    assert sorted(request.order for request, _, _ in got) == [0, 1, 2]
    for request, ref, summary in got:
        want, found = group(request, ()), ray.get(ref)
        assert summary == want.summary(tuple(range(SIZE)))
        assert [t.sample for t in found.trajectories] == list(range(SIZE))
        assert all(
            (a.token_ids() == b.token_ids()).all() for a, b in zip(found.trajectories, want.trajectories, strict=True)
        )
        assert found.scores == want.scores
