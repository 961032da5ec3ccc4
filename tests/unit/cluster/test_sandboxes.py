"""The pool of sandbox actors, on a real local Ray: what dies or hangs costs its own calls, in bounded time."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest
import ray

from stare_megatron import config, tasks
from stare_megatron.cluster.sandboxes import PoolBox, Sandboxes, make_client
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.rollout.groups import Runner
from stare_megatron.sandbox.result import Result, Status
from stare_megatron.tasks.tiny_model import default_settings, make_model, make_tokenizer, save
from stare_megatron.types import Completion, GroupRequest, Prompt, Sampling, SpanKind
from stare_megatron.types import Status as Ended
from tests.contracts.source import ROOT

CONFIG = SandboxConfig(
    require="limits", actors=2, workers=1, preload=[], actor_cpus=0.0, queue_seconds=60.0, health_seconds=8.0
)


pytestmark = [pytest.mark.parts, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def pool(local_ray, tmp_path_factory):
    """One for all tests: each leaves it whole."""
    sandboxes = Sandboxes(
        CONFIG, tmp_path_factory.mktemp("pool") / "logs", [{"num_cpus": CONFIG.actor_cpus}] * CONFIG.actors
    )
    try:
        places = sandboxes.ready(600.0)
        assert {place.level for place in places} <= {"limits", "filter", "landlock", "namespaces"}
        yield sandboxes
    finally:
        sandboxes.close()


def play(pool: Sandboxes, scene):
    async def main():
        async with make_client(CONFIG, pool.actors) as box:
            assert isinstance(box, PoolBox)
            return await scene(box)

    return asyncio.run(main())


def pids(pool: Sandboxes) -> list[int]:
    return ray.get([actor.ping.remote() for actor in pool.actors])


def test_calls_and_states_go_through(pool):
    async def scene(box):
        assert await box.check()
        first, wrong, late = await asyncio.gather(
            box.run("print(input())\n6 * 7", "in", echo=True), box.run("1/0"), box.run("while True: 1", seconds=0.5)
        )
        assert (first.status, first.stdout, first.value) == (Status.OK, "in\n", "42")
        assert (wrong.status, late.status) == (Status.ERROR, Status.TIMEOUT)
        async with box.session() as a, box.session() as b, box.session() as c:
            await asyncio.gather(*(s.run(f"x = {i}") for i, s in enumerate((a, b, c))))
            values = [await s.run("x", echo=True) for s in (a, b, c)]
        assert [v.value for v in values] == ["0", "1", "2"]
        assert (await a.run("x")).status is Status.LOST

    play(pool, scene)
    deadline = time.monotonic() + 120
    while any(h.sessions for h in ray.get([a.health.remote() for a in pool.actors])) and time.monotonic() < deadline:
        time.sleep(0.1)
    healths = ray.get([a.health.remote() for a in pool.actors])
    assert [h.sessions for h in healths] == [0, 0]
    assert all(h.calls > 0 for h in healths), "the calls were spread"


def test_a_killed_actor_costs_its_own_calls_and_is_replaced(pool):
    before = pids(pool)

    async def scene(box):
        async with box.session() as a, box.session() as b:
            await asyncio.gather(a.run("x = 1"), b.run("x = 2"))
            sleeping = [asyncio.create_task(s.run("import time; time.sleep(4); x", echo=True)) for s in (a, b)]
            await asyncio.sleep(1.0)
            os.kill(before[0], signal.SIGKILL)
            results: list[Result] = await asyncio.wait_for(asyncio.gather(*sleeping), 300)
            assert sorted(r.status.value for r in results) == ["lost", "ok"]
            alive, dead = (a, b) if results[0].status is Status.OK else (b, a)
            assert (await alive.run("x", echo=True)).status is Status.OK
            assert (await dead.run("x", echo=True)).status is Status.LOST
        # While it comes back the other serves; then both do.
        assert (await box.run("print(1)")).status is Status.OK
        deadline = time.monotonic() + 300
        while box._down and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        assert not box._down
        assert all(r.status is Status.OK for r in await asyncio.gather(*(box.run("print(1)") for _ in range(4))))

    play(pool, scene)
    after = pids(pool)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_an_actor_that_hangs_is_found_and_replaced(pool):
    before = pids(pool)

    async def scene(box):
        os.kill(before[1], signal.SIGSTOP)
        results = await asyncio.wait_for(asyncio.gather(*(box.run("print(1)") for _ in range(4))), 300)
        assert {r.status for r in results} == {Status.OK, Status.LOST}
        deadline = time.monotonic() + 300
        while box._down:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        assert all(r.status is Status.OK for r in await asyncio.gather(*(box.run("print(1)") for _ in range(4))))

    play(pool, scene)
    assert pids(pool)[1] != before[1]


def test_waiting_is_bounded(pool):
    """Where all workers are busy for longer than `queue_seconds`, further calls are lost and not held for ever."""
    box_config = CONFIG.model_copy(update={"queue_seconds": 1.0})

    async def scene(_):
        async with PoolBox(box_config, pool.actors) as box:
            long = [asyncio.create_task(box.run("import time; time.sleep(6)")) for _ in range(4)]
            await asyncio.sleep(0.2)
            late = await box.run("print(1)")
            assert late.status is Status.LOST
            assert "no turn within 1 s" in late.stderr
            await asyncio.gather(*long)

    play(pool, scene)


class Scripted:
    """A sampler that writes what it is told: turn after turn, by the sample's seed."""

    version = 7

    def __init__(self, tokenizer, scripts: list[list[str]], prompt_tokens: int) -> None:
        self._tokenizer, self._scripts, self._prompt_tokens = tokenizer, scripts, prompt_tokens
        self._taken = 0

    async def sample(self, token_ids, sampling) -> Completion:
        if len(token_ids) == self._prompt_tokens:
            turns = self._scripts[self._taken]
            self._taken += 1
        else:  # after an observation: go on as the script that began so
            said = self._tokenizer.decode(token_ids[self._prompt_tokens :])
            turns = next(s for s in self._scripts if said.startswith(s[0]))[1:]
        ids = self._tokenizer.encode(turns[0], add_special_tokens=False)
        if "</code>" not in turns[0]:
            ids.append(self._tokenizer.eos_token_id)
        return Completion(np.asarray(ids, np.int32), np.zeros(len(ids), np.float32), Ended.COMPLETED, self.version)


def test_episodes_play_in_the_pool(pool, tmp_path):
    """The small example's environment and reward, scripted turns, the real sandbox behind Ray: what is graded and
    counted, and what the policy is shown."""
    model = tmp_path / "model"
    tokenizer = make_tokenizer(tasks.get("tool_arithmetic"))
    save(make_model(default_settings("tool_arithmetic", 1, 0)), tokenizer, model)
    made = config.load(ROOT / "examples/tool_use_cpu/run.toml", [f"model.path={model}"])
    prompt = Prompt("p", "tool_arithmetic", "347*582=", tuple(tokenizer.encode("347*582=")), "201954")
    scripts = [
        ["<code>print(347*582)</code>", "201954"],
        ["<code>a=582*347\nprint(a)</code>", "201955"],
        ["<code>print(347*)</code>", "1"],
        ["201954"],
    ]
    request = GroupRequest(0, prompt, len(scripts), Sampling(128, 1.0, 1.0, (), 1))

    async def scene(box):
        run = Runner(made, Scripted(tokenizer, scripts, len(prompt.token_ids)), box)
        group, summary = await run(request)
        assert summary.rewards == (1.0, 0.0, 0.0, 1.0)
        assert [(e.turns, e.calls, e.call_errors) for e in summary.episodes] == [
            (2, 1, 0),
            (2, 1, 0),
            (2, 1, 1),
            (1, 0, 0),
        ]
        seen = [s for s in group.trajectories[0].spans if s.kind is SpanKind.OBSERVATION]
        assert tokenizer.decode(seen[0].token_ids) == "\n<interpreter>\n201954\n</interpreter>\n"

    play(pool, scene)
