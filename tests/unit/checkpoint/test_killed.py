"""A save of a run that samples ahead, killed at every point."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import checkpoint
from stare_megatron.checkpoint import Ahead, store
from tests.unit.checkpoint.test_checkpoint_store import Ranks, saver, state


class Killed(BaseException):
    pass


# The calls that change the disk, the one after the other.
POINTS = [
    (store.loop, "write"), (store.stored, "write"), (store.sampled, "write"), (Ranks, "begin_save"),
    (Ranks, "finish_save"), (store.manifest, "write"), (store, "take_place"), (store, "write_atomic"),
]  # fmt: skip


def batch(step: int) -> Ahead:
    """What is in hand at `step`, told apart by its seconds."""
    return Ahead((), (), (), (), float(step), state(step + 1).stream)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[f"{o.__name__.rpartition('.')[2]}.{n}" for o, n in POINTS])
def test_killed_at_any_point(tmp_path: Path, owner: Any, name: str, after: bool) -> None:
    """The next start finds a whole checkpoint with the batch that belongs to it: the new one once it has its name,
    whatever `latest` says, before that the old one. The save after it removes what was left."""
    saver(tmp_path).save(state(2), batch(2))
    real = vars(owner)[name]

    def dies(*args: Any, **named: Any) -> Any:
        if after:
            real(*args, **named)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dies)
        with contextlib.suppress(Killed):
            saver(tmp_path).save(state(3), batch(3))
    named = name == "write_atomic" or (name == "take_place" and after)
    folder = checkpoint.find(tmp_path, "auto")
    assert folder is not None
    assert folder == tmp_path / store.folder_name(3 if named else 2)
    checkpoint.verify(folder, contents=True)
    assert checkpoint.read(folder) == state(store.step_of(folder))
    assert checkpoint.read_ahead(folder) == batch(store.step_of(folder))
    saver(tmp_path).save(state(4), batch(4))
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    assert not list(tmp_path.glob("*.partial"))
