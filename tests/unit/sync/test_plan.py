"""Who sends what: every element needed travels once, from somebody who holds it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.sync.place import Carrier, Place, carrier
from stare_megatron.sync.plan import Party, plan, require_taken
from tests.properties import bounded

A, B = Place("a"), Place("b")
PLACES = (A, B, Place("a", "GPU-1"), Place("a", "GPU-2"), Place("b", "GPU-1"))


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """[0, size) in consecutive ranges."""
    inner = sorted(draw(st.sets(st.integers(1, size - 1), max_size=4))) if size > 1 else []
    return list(zip([0, *inner], [*inner, size], strict=True))


@st.composite
def layouts(draw: st.DrawFn, tensors: dict[str, tuple[int, ...]]) -> list[Box]:
    """All tensors in boxes, a grid each."""
    boxes = []
    for name, shape in tensors.items():
        grid = [draw(cuts(n)) for n in shape]
        places = [()]
        for axis in grid:
            places = [(*place, part) for place in places for part in axis]
        boxes += [Box(name, tuple(b for b, _ in place), tuple(e for _, e in place)) for place in places]
    return boxes


def parties(draw: st.DrawFn, boxes: list[Box], count: int, most_copies: int) -> list[Party]:
    """Boxes dealt out, each to one party or several."""
    own: list[list[Box]] = [[] for _ in range(count)]
    for box in boxes:
        for who in draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=most_copies)):
            own[who].append(box)
    return [Party(draw(st.sampled_from(PLACES)), tuple(mine)) for mine in own]


@st.composite
def pushes(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], list[Party], list[Party], int]:
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)
    tensors = {f"t{i}": shape for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4)))}
    senders = parties(draw, draw(layouts(tensors)), draw(st.integers(1, 4)), 3)
    workers = parties(draw, draw(layouts(tensors)), draw(st.integers(1, 3)), 3)
    return tensors, senders, workers, draw(st.integers(1, 60))


@bounded(100)
@given(pushes())
def test_every_element_needed_is_received_exactly_once(push) -> None:
    tensors, senders, workers, bucket = push
    messages = plan(senders, workers, 2, bucket)
    for w, worker in enumerate(workers):
        got = [np.zeros(tensors[need.name], np.int64) for need in worker.boxes]
        for m in messages:
            if m.worker != w:
                continue
            for piece in m.pieces:
                where = tuple(slice(b, e) for b, e in zip(piece.box.begin, piece.box.end, strict=True))
                got[piece.need][where] += 1
                held = senders[m.sender].boxes[piece.held]
                assert piece.box.intersection(held) == piece.box
        for need, count in zip(worker.boxes, got, strict=True):
            inside = tuple(slice(b, e) for b, e in zip(need.begin, need.end, strict=True))
            assert (count[inside] == 1).all()
            assert count.sum() == need.elements
    assert sum(m.elements for m in messages) == sum(need.elements for worker in workers for need in worker.boxes)
    for m in messages:
        assert m.elements * 2 <= bucket or len(m.pieces) == 1


@bounded(100)
@given(pushes())
def test_a_sender_on_the_same_gpu_comes_first_then_one_on_the_same_machine(push) -> None:
    _, senders, workers, _ = push
    for m in plan(senders, workers, 2):
        here = workers[m.worker].place
        held = {senders[m.sender].boxes[piece.held] for piece in m.pieces}
        away = senders[m.sender].place.distance(here)
        nearer = {box for s in senders if s.place.distance(here) < away for box in s.boxes}
        assert not held & nearer


def test_what_both_have_carries_the_weights() -> None:
    one, other, far = Place("a", "GPU-1"), Place("a", "GPU-2"), Place("b", "GPU-3")
    assert [carrier(A, B), carrier(A, A)] == [Carrier.GLOO, Carrier.MAPPED]
    assert [carrier(one, place) for place in (one, other, far)] == [Carrier.IPC, Carrier.NCCL, Carrier.NCCL]
    assert carrier(one, Place("b", "GPU-1")) is Carrier.NCCL  # another container on the machine: no memory in common
    with pytest.raises(RunError, match="rank on GPU GPU-1 and an engine worker on a CPU"):
        carrier(one, A)


def test_replicas_share_the_work() -> None:
    boxes = tuple(Box(f"t{i}", (0,), (100,)) for i in range(8))
    messages = plan([Party(A, boxes), Party(A, boxes)], [Party(A, boxes), Party(A, boxes)], 2)
    sent = [sum(m.elements for m in messages if m.sender == s) for s in (0, 1)]
    assert sent == [800, 800]


def test_a_bucket_holds_what_all_senders_have_under_way_for_a_worker() -> None:
    halves = [tuple(Box(f"t{i}", (s * 50,), (s * 50 + 50,)) for i in range(4)) for s in (0, 1)]
    whole = tuple(Box(f"t{i}", (0,), (100,)) for i in range(4))
    messages = plan([Party(A, half) for half in halves], [Party(B, whole)], 1, 100)
    assert [(m.sender, m.elements) for m in messages] == [(0, 50), (1, 50)] * 4


def test_what_nobody_holds_is_named() -> None:
    need = Party(A, (Box("norm", (0,), (8,)), Box("w", (0, 0), (4, 4))))
    with pytest.raises(RunError, match=r"worker 0 needs w\[0:4, 0:4\].* 8 of 16"):
        plan([Party(A, (Box("norm", (0,), (8,)), Box("w", (0, 0), (2, 4))))], [need], 2)
    twice = Party(A, (Box("w", (0, 0), (3, 4)), Box("w", (2, 0), (4, 4))))
    with pytest.raises(RunError, match="overlap"):
        plan([twice], [need], 2)


def test_a_tensor_that_no_worker_takes_whole_is_named() -> None:
    halves = [Box("a", (0, 0), (2, 3)), Box("a", (2, 0), (4, 3))]
    experts = [Box(f"experts.{i}", (0,), (2,)) for i in range(2)]
    shapes = {"a": (4, 3), "experts.0": (2,), "experts.1": (2,)}
    workers = [Party(A, (half, experts[i])) for i, half in enumerate(halves)]
    require_taken(shapes, workers)
    require_taken(shapes, [*workers, *workers])
    with pytest.raises(RunError, match=r"take 6 of the 12 elements of a$"):
        require_taken(shapes, [workers[0], Party(A, (halves[0], experts[1]))])
    with pytest.raises(RunError, match=r"take 0 of the 2 elements of experts\.1$"):
        require_taken(shapes, [Party(A, (half, experts[0])) for half in halves])
