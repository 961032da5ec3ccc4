"""What a checkpoint keeps beside the weights: read back exactly, or refused in one line, whatever its files hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stare_megatron.algo.controller import ControllerState
from stare_megatron.checkpoint import settings, state
from stare_megatron.checkpoint.state import LoopState
from stare_megatron.data.prompts import StreamState
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.types import GateDuty, Observed
from tests.properties import SCALARS, bounded, nested

COUNTS, FINITE = st.integers(0, 2**40), st.floats(allow_nan=False, allow_infinity=False)
STATES = st.builds(
    LoopState,
    step=COUNTS,
    trained_tokens=COUNTS,
    stream=st.builds(StreamState, COUNTS, COUNTS, COUNTS, st.text("0123456789abcdef", max_size=8)),
    controller=st.builds(ControllerState, FINITE, FINITE, FINITE, COUNTS, FINITE),
    before=st.builds(Observed, st.floats(), st.floats()),
    duty=st.builds(GateDuty, COUNTS, COUNTS),
    wandb_run=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    probe_baseline=FINITE,
)
WHOLE = LoopState(3, 9, StreamState(0, 3, 1, "ab"), ControllerState(1.1, 0.9), Observed(0.3, 0.1), GateDuty(3, 1), "")
ANY = nested(SCALARS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("step")


@bounded(150)
@given(STATES)
def test_a_state_is_read_back_as_it_was(folder: Path, written: LoopState) -> None:
    state.write(folder, written)
    assert repr(state.read(folder)) == repr(written)  # NaN is not equal to itself


def test_a_checkpoint_without_a_baseline_of_the_probe_has_none(folder: Path) -> None:
    state.write(folder, WHOLE)
    tree = json.loads((folder / state.FILE).read_text())
    assert tree.pop("probe_baseline") == 0.0
    (folder / state.FILE).write_text(json.dumps(tree))
    assert state.read(folder) == WHOLE


def refused(read: Any, file: Path) -> bool:
    try:
        read()
    except UserError as e:
        said = str(e)
        assert str(file) in said
        assert "\n" not in said
        return True
    return False


@bounded(200)
@given(st.sampled_from([(), ("stream",), ("controller",), ("before",), ("duty",)]), st.data())
def test_any_value_in_the_loops_state(folder: Path, table: tuple[str, ...], data: st.DataObject) -> None:
    """What is accepted has the types it says."""
    tree = dataclasses.asdict(WHOLE)
    inner = tree[table[0]] if table else tree
    inner[data.draw(st.sampled_from([*inner, "more"]))] = data.draw(ANY)
    (folder / state.FILE).write_text(json.dumps(tree))
    if not refused(lambda: state.read(folder), folder / state.FILE):
        read = state.read(folder)
        assert type(read.stream.cursor) is type(read.duty.opened) is int
        assert type(read.controller.integral) is type(read.before.entropy) is float


@bounded(150)
@given(ANY.map(json.dumps) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("[" * 100_000)
@example('{"step": 1e999}')
@example('{"algorithm": "xxh3_128", "files": {"a": {"bytes": 1e999, "checksum": ""}}}')
def test_files_of_anything(folder: Path, text: str) -> None:
    for name in (state.FILE, settings.FILE, manifest.NAME):
        (folder / name).write_text(text)
    assert refused(lambda: state.read(folder), folder / state.FILE)
    now = settings.Settings({"model": {"path": "m"}}, {})
    assert refused(lambda: settings.check_settings(folder, now, []), folder / settings.FILE)
    refused(lambda: manifest.read(folder), folder / manifest.NAME)


NAMES = st.text("ab. é", max_size=4)
NESTED = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=6)


@bounded(100)
@given(st.fixed_dictionaries({"config": st.dictionaries(NAMES, NESTED) | SCALARS, "files": NESTED}))
def test_any_settings(folder: Path, tree: dict[str, Any]) -> None:
    (folder / settings.FILE).write_text(json.dumps(tree))
    now = settings.Settings({"model": {"path": "m"}, "run": {"steps": 3}}, {"config.json": "ab"})
    assert refused(lambda: settings.check_settings(folder, now, []), folder)
