"""Who has the trainer's ranks: who trains, or who gives an engine that came back its weights."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from stare_megatron.cluster.trainers import TrainerGroup


def group() -> Any:
    made: Any = TrainerGroup.__new__(TrainerGroup)
    made._turn, made._moved_on = threading.RLock(), True
    made._actors = [SimpleNamespace(call=SimpleNamespace(remote=lambda *_, **__: None))]
    made._push = lambda *_: {}
    made._wait = lambda refs, *_: [None for _ in refs]
    return made


def is_free(made: TrainerGroup) -> bool:
    found: list[bool] = []

    def ask() -> None:
        with made.free() as free:
            found.append(free)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(10)
    return found[0]


def test_ranks_are_free_from_a_push_to_the_next_update():
    made = group()
    assert not is_free(made)  # nothing was pushed yet
    made.push(0, [0])
    assert is_free(made)
    made.score()
    assert is_free(made)
    made.update(None, keep_tokens=False)
    assert not is_free(made)
    made.push(1, [0])
    assert is_free(made)


def test_ranks_that_do_something_are_not_free():
    made = group()
    made.push(0, [0])
    seen: list[bool] = []
    made._wait = lambda refs, *_: seen.append(is_free(made)) or [None for _ in refs]
    made.score()
    assert seen == [False]
    assert is_free(made)
