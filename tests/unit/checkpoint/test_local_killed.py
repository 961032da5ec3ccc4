"""A save on nodes' own disks, and its copy, killed at every point."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import checkpoint
from stare_megatron.checkpoint import copies, store
from stare_megatron.host import node_disk
from tests.unit.checkpoint.test_local import Ranks, Run, state


class Killed(BaseException):
    pass


# The calls that change a disk, of a save and its copy, the one after the other.
POINTS = [
    (store.loop, "write"), (store.stored, "write"), (Ranks, "begin_save"), (Ranks, "finish_save"),
    (store.manifest, "write"), (store, "take_place"), (store, "write_atomic"), (store, "remove"), (Ranks, "tidy"),
    (copies, "copy"), (Ranks, "begin_copy"), (node_disk, "copy"), (Ranks, "finish_copy"), (store, "sweep"),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[f"{o.__name__.rpartition('.')[2]}.{n}" for o, n in POINTS])
def test_killed_at_any_point(tmp_path: Path, owner: Any, name: str, nth: int, after: bool) -> None:
    """The next start finds the newest whole checkpoint of each kind, never an older one than there was, and the one
    after that has removed what the killed one left."""
    run = Run(tmp_path)
    run.saved(1, 2)
    real, calls = vars(owner)[name], [0]

    def dies(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth and not after:
            raise Killed
        found = real(*args, **named)
        if calls[0] == nth:
            raise Killed
        return found

    saver = run.saver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dies)
        with contextlib.suppress(Killed):
            saver.save(state(3))
            saver.wait()
    newest = run.newest()
    assert newest is not None
    assert store.step_of(newest) in (2, 3)
    durable = checkpoint.find(run.root, "auto")
    assert durable is not None
    checkpoint.verify(durable, contents=True)
    assert store.step_of(durable) in (2, 3)
    run.saved(4)
    assert (run.local, run.on_nodes, run.durable[-1]) == ([4], ["step_000004"], 4)
    assert not list(run.root.glob("**/*.partial"))
