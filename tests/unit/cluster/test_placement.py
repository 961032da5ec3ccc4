"""Who has which bundle after a node was lost. (On a real Ray: tests/e2e/test_placement.py.)"""

from __future__ import annotations

from stare_megatron.cluster.placement import Found, in_place


def found(text: str) -> list[Found]:
    """Bundles 0, 1, ... from "node:gpu node:gpu ..."."""
    return [Found(i, node, gpu, 1) for i, (node, gpu) in enumerate(where.split(":") for where in text.split())]


def test_what_lives_stays_and_what_was_lost_takes_the_places_that_are_free():
    """Node b is lost. Another whose name comes first has room for what was there; Ray gives it in another order."""
    before = found("b:0 b:1 m:0 m:1")
    now = found("a:3 a:2 m:0 m:1")
    assert [b.index for b in in_place(before, now)] == [1, 0, 2, 3]
    assert in_place(before, list(reversed(now))) == in_place(before, now)
    assert in_place(before, before) == before


def test_ranks_of_a_node_are_together_on_the_next():
    before = found("b:0 m:0 b:1 b:2 b:3")
    now = found("z:0 m:0 a:0 z:1 a:1")
    assert [(b.node, b.gpu) for b in in_place(before, now)] == [
        ("a", "0"),
        ("m", "0"),
        ("a", "1"),
        ("z", "0"),
        ("z", "1"),
    ]
