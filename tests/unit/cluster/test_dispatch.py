"""Who samples what when engines are lost and come back. Ray, and what looks after engines, are stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions

from stare_megatron.cluster import dispatch, runtime
from stare_megatron.cluster.dispatch import Dispatch, Limits
from stare_megatron.cluster.fleet import Fleet
from stare_megatron.config import InferenceConfig
from stare_megatron.errors import EngineLostError, GivenUpError, RunError
from stare_megatron.types import GroupRequest, Prompt


class Keeper:
    """Engines that serve a group each time somebody waits, but for those that are lost."""

    def __init__(self, engines: int, **settings: Any) -> None:
        self.fleet = Fleet(InferenceConfig(engines=engines, **settings), pushes=True)
        self.fleet.pushed(range(engines), 0, 0.0)
        self.served: list[tuple[int, int, int]] = []  # engine, incarnation, seed
        self.incarnation = [0] * engines
        self.queues: dict[int, list[str]] = {i: [] for i in range(engines)}
        self.refs: dict[str, Any] = {}
        self.dying: dict[int, Exception] = {}
        self.lost_parts = 0  # joins that are to fail
        self.lengths: dict[str, int] = {}
        self.actors = [self.make(i) for i in range(engines)]

    def make(self, i: int) -> Any:
        def asked(request: GroupRequest, samples: tuple[int, ...], parts: tuple[str, ...] = ()) -> tuple[str, str]:
            ref = f"{i}.{self.incarnation[i]}.{len(self.refs)}"
            found = SimpleNamespace(engine=i, incarnation=self.incarnation[i], request=request, samples=samples)
            self.refs[ref] = found
            found.parts = parts
            self.queues[i].append(ref)
            return f"group {ref}", ref

        def join(reflections: tuple[int, ...], *parts: str) -> tuple[str, str]:
            first = self.refs[parts[0].removeprefix("group ")]
            return asked(first.request, reflections, parts)

        return SimpleNamespace(run_group=SimpleNamespace(remote=asked), join=SimpleNamespace(remote=join))

    def require(self) -> None:
        if text := self.fleet.too_few:
            raise EngineLostError(text)

    def lost(self, engine: int, actor: Any, error: EngineLostError) -> None:
        if self.actors[engine] is actor:
            self.fleet.lost(engine, 1.0, str(error))

    def tick(self) -> bool:
        """Those that are due come back."""
        due = self.fleet.due(100.0)
        for i in due:
            self.fleet.restarted(i)
            self.fleet.started(i, 100.0)
            self.incarnation[i] += 1
            self.dying.pop(i, None)
            self.actors[i] = self.make(i)
        return bool(due)

    def first(self, flying, what, changed):
        """An engine that is lost answers for all that it had; else one that is well ends its first group."""
        if changed():
            return None
        for ref in flying:
            found = self.refs[ref]
            if found.incarnation < self.incarnation[found.engine] or found.engine in self.dying:
                return ref
        return next(iter(flying))

    def get(self, ref: str, name: str, lost: type[Exception]) -> Any:
        found = self.refs[ref]
        if found.engine in self.dying:
            raise self.dying[found.engine]
        if found.incarnation < self.incarnation[found.engine]:
            raise EngineLostError("its process died")
        if found.parts and self.lost_parts:
            self.lost_parts -= 1
            raise ray.exceptions.ObjectLostError("0" * 56, None, "")
        if not found.parts:
            self.served.append((found.engine, found.incarnation, found.request.seed))
        tokens = tuple(self.lengths.get(found.request.prompt.id, 10) for _ in found.samples)
        return SimpleNamespace(reflections=found.samples, num_action_tokens=tokens, parts=found.parts)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    def make(engines: int, in_flight: int = 8, limits: Any = None, **settings: Any) -> tuple[Keeper, Dispatch]:
        keeper = Keeper(engines, **settings)
        crew = SimpleNamespace(first=keeper.first, names=[f"engine {i}" for i in range(engines)])
        monkeypatch.setattr(runtime, "get", keeper.get)
        monkeypatch.setattr(dispatch.time, "sleep", lambda _: None)
        return keeper, Dispatch(keeper, crew, Limits(in_flight, **(limits or {})))  # pyright: ignore

    return make


def requests(count: int, prompt_tokens: int = 10, prefix: str = "p") -> Any:
    prompts = [Prompt(f"{prefix}{n}", "s", "q", (1,) * prompt_tokens, "a") for n in range(count)]
    return [SimpleNamespace(seed=n, group_size=4, prompt=prompt) for n, prompt in enumerate(prompts)]


def nothing() -> None: ...


def renewing(keeper: Keeper, asked: list[list[int]]):
    def renew(engines) -> None:
        asked.append(list(engines))
        keeper.fleet.pushed(engines, 0, 101.0)

    return renew


def test_groups_of_a_lost_engine_are_sampled_by_others_with_their_seeds(made):
    keeper, dispatcher = made(2, restarts=0)
    dispatcher.submit(requests(8))
    keeper.dying[1] = EngineLostError("its process died")
    got = [request.seed for request, _, _ in dispatcher.results(lambda _: None, nothing)]
    assert sorted(got) == list(range(8))
    assert {engine for engine, _, _ in keeper.served} == {0}
    assert dispatcher.take_again() == 2  # as many as it was given
    assert dispatcher.take_again() == 0


def test_one_that_comes_back_is_renewed_before_it_serves(made):
    keeper, dispatcher = made(1, restarts=2)
    asked: list[list[int]] = []
    dispatcher.submit(requests(5))
    keeper.dying[0] = EngineLostError("its process died")
    got = [request.seed for request, _, _ in dispatcher.results(renewing(keeper, asked), nothing)]
    assert sorted(got) == list(range(5))
    assert asked == [[0]]
    assert {incarnation for _, incarnation, _ in keeper.served} == {1}


def test_answers_of_a_former_life_blame_nobody(made):
    """The last groups of a dead engine fail after it has come back."""
    keeper, dispatcher = made(1, restarts=1)
    dispatcher.submit(requests(2))
    keeper.fleet.lost(0, 1.0, "silent")
    got = [r.seed for r, _, _ in dispatcher.results(renewing(keeper, []), nothing)]
    assert sorted(got) == [0, 1]
    assert keeper.fleet.alive == 1


def test_too_few_engines_end_it_with_the_last_reason(made):
    keeper, dispatcher = made(2, restarts=0, min_engines=2)
    dispatcher.submit(requests(4))
    keeper.dying[0] = EngineLostError("its vLLM process died")
    with pytest.raises(EngineLostError, match=r"engine 0: its vLLM process died; 1 of 2 engines are left, .*wants 2"):
        list(dispatcher.results(lambda _: None, nothing))


def test_an_engine_that_fails_and_lives_ends_it_as_before(made):
    keeper, dispatcher = made(2)
    dispatcher.submit(requests(4))
    keeper.dying[0] = RunError("engine 0: 3 tokens came with 2 log-probs")
    with pytest.raises(RunError, match="came with 2 log-probs"):
        list(dispatcher.results(lambda _: None, nothing))


def test_a_new_group_goes_to_the_least_loaded_and_no_engine_gets_too_many(made):
    keeper, dispatcher = made(2, in_flight=8)
    dispatcher.submit(requests(6))
    assert [len(queue) for queue in keeper.queues.values()] == [2, 2]
    keeper.fleet.silent(0, 11.0, 1.0, "no answer")  # a suspect keeps what it has and gets nothing
    results = dispatcher.results(lambda _: None, nothing)
    next(results)
    assert [len(queue) for queue in keeper.queues.values()] == [2, 2]


def test_what_is_given_up_is_cancelled(made, monkeypatch):
    keeper, dispatcher = made(1)
    cancelled: list[str] = []
    monkeypatch.setattr(dispatch.ray, "cancel", cancelled.append)
    dispatcher.submit(requests(3))
    dispatcher.forget()
    assert cancelled == keeper.queues[0]
    assert list(dispatcher.results(lambda _: None, nothing)) == []


def test_giving_up_ends_it_until_what_was_ordered_is_forgotten(made, monkeypatch):
    _, dispatcher = made(1)
    monkeypatch.setattr(dispatch.ray, "cancel", lambda _: None)
    dispatcher.submit(requests(3))
    dispatcher.give_up()
    with pytest.raises(GivenUpError, match="given up"):
        list(dispatcher.results(lambda _: None, nothing))
    dispatcher.forget()
    dispatcher.submit(requests(1))
    assert len(list(dispatcher.results(lambda _: None, nothing))) == 1


def test_an_engine_that_cannot_be_renewed_yet_is_tried_again(made):
    """While the ranks are busy; the others sample on."""
    keeper, dispatcher = made(2, restarts=2)
    dispatcher.submit(requests(6))
    keeper.dying[1] = EngineLostError("its process died")
    tries: list[list[int]] = []

    def renew(engines) -> None:
        tries.append(list(engines))
        if len(tries) > 3:
            keeper.fleet.pushed(engines, 0, 101.0)

    assert len(list(dispatcher.results(renew, nothing))) == 6
    assert tries == [[1]] * 4


SHORT = 20
SPREAD = {"spread_below": SHORT}


def test_a_group_with_a_short_prompt_is_spread_below_a_limit(made):
    """Every sample once, in parts on engines of their own; joined in their order, and handed out once."""
    keeper, dispatcher = made(3, in_flight=16, limits={"spread_below": SHORT})
    dispatcher.submit([*requests(2, SHORT - 1), *requests(1, SHORT, "long")])
    found = [keeper.refs[ref] for queue in keeper.queues.values() for ref in queue]
    for name in ("p0", "p1"):
        parts = [f for f in found if f.request.prompt.id == name]
        assert sorted(n for part in parts for n in part.samples) == [0, 1, 2, 3]
        assert len({part.engine for part in parts}) == 3
    assert [f.samples for f in found if f.request.prompt.id == "long0"] == [(0, 1, 2, 3)]
    got = list(dispatcher.results(lambda _: None, nothing))
    assert sorted(request.prompt.id for request, _, _ in got) == ["long0", "p0", "p1"]
    for request, ref, summary in got:
        assert summary.reflections == (0, 1, 2, 3)  # in the order of samples, whatever came first
        assert len(summary.parts) == (0 if request.prompt.id == "long0" else 3)
        assert ref.startswith("group ")


def test_a_lost_engine_costs_its_parts_and_no_others(made):
    keeper, dispatcher = made(2, in_flight=16, limits=SPREAD, restarts=0)
    dispatcher.submit(requests(3))
    keeper.dying[1] = EngineLostError("its process died")
    got = [request.seed for request, _, _ in dispatcher.results(lambda _: None, nothing)]
    assert sorted(got) == [0, 1, 2]
    assert dispatcher.take_again() == 3  # one part of each
    assert len(keeper.served) == 6
    assert {engine for engine, _, _ in keeper.served} == {0}


def test_parts_that_went_with_their_node_are_sampled_again(made):
    keeper, dispatcher = made(2, in_flight=16, limits=SPREAD)
    keeper.lost_parts = 1
    dispatcher.submit(requests(2))
    got = [request.seed for request, _, _ in dispatcher.results(lambda _: None, nothing)]
    assert sorted(got) == [0, 1]
    assert dispatcher.take_again() == 1
    assert len(keeper.served) == 6  # two parts of each, and of one again


def test_one_engine_gets_groups_whole(made):
    keeper, dispatcher = made(1, limits=SPREAD)
    dispatcher.submit(requests(1))
    assert [keeper.refs[ref].samples for ref in keeper.queues[0]] == [(0, 1, 2, 3)]


def learn(keeper: Keeper, dispatcher: Dispatch, lengths: dict[str, int]) -> None:
    """Responses to prompts p0, p1, ... are so long."""
    keeper.lengths = lengths
    dispatcher.submit(requests(len(lengths)))
    assert len(list(dispatcher.results(lambda _: None, nothing))) == len(lengths)
    for queue in keeper.queues.values():
        queue.clear()


def test_longest_first_of_those_that_come_together(made):
    lengths = {"p0": 5, "p1": 900, "p2": 70}
    for longest_first, order in ((True, ["p1", "p2", "p0"]), (False, ["p0", "p1", "p2"])):
        keeper, dispatcher = made(1, in_flight=64, limits={"longest_first": longest_first})
        learn(keeper, dispatcher, lengths)
        dispatcher.submit(requests(3))
        dispatcher.submit(requests(1, prefix="later"))
        assert [keeper.refs[ref].request.prompt.id for ref in keeper.queues[0]] == [*order, "later0"]


def test_the_engine_with_the_fewest_expected_tokens_is_next(made):
    keeper, dispatcher = made(2, in_flight=64, limits={"longest_first": True})
    learn(keeper, dispatcher, {"p0": 900, "p1": 5, "p2": 5, "p3": 5})
    dispatcher.submit(requests(4))
    assert [len(queue) for queue in keeper.queues.values()] == [1, 3]
