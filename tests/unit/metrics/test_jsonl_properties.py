"""`metrics.jsonl` after anything that may happen to it: read, or refused by name of its line."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import Metric
from tests.properties import SCALARS, TEXT, bounded, nested

LINES = (
    st.dictionaries(TEXT | st.just("step"), SCALARS | nested(SCALARS), max_size=4).map(json.dumps)
    | nested(SCALARS).map(json.dumps)
    | st.text(st.characters(), max_size=20)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / jsonl.FILE


@bounded(200)
@given(st.lists(LINES, max_size=4))
@example(["[" * 100_000, "{}"])
@example(['{"step": 1e400}', '{"step": 1}'])
@example(['{"step": ' + "9" * 5000 + "}", "{}"])
def test_any_lines(path: Path, lines: list[str]) -> None:
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        rows = jsonl.read(path)
    except UserError as e:
        said = str(e)
        assert said.startswith(f"{path}:")
        assert "\n" not in said
    else:
        assert all(row["step"] == int(row["step"]) for row in rows)


@bounded(60)
@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_packed_or_not(path: Path, content: bytes, real: bool) -> None:
    packed = path.with_name("metrics.jsonl.gz")
    packed.write_bytes(gzip.compress(content)[: len(content) + 8] if real else content)
    for file in (packed, path):
        file.write_bytes(packed.read_bytes())
        try:
            jsonl.read_record(file)
        except UserError as e:
            said = str(e)
            assert said.startswith(str(file))
            assert "\n" not in said


VALUES = st.lists(st.floats(), min_size=1, max_size=6)


def write(path: Path, values: list[float], restored: int, begin: int) -> None:
    sink = jsonl.JsonlSink(path, restored)
    for step, value in enumerate(values[begin:], begin + 1):
        sink.log(step, [Metric("time/step", value, "s")])
    sink.close()


def seen(path: Path) -> list[tuple[float, str]]:
    return [(row["step"], repr(row["time/step"])) for row in jsonl.read(path)]


@bounded(120)
@given(VALUES, st.integers(0, 400), st.data())
def test_a_run_that_is_cut_off_anywhere_and_goes_on_has_every_step_once(
    path: Path, values: list[float], cut: int, data: st.DataObject
) -> None:
    path.unlink(missing_ok=True)
    write(path, values, 0, 0)
    whole = seen(path)
    assert whole == [(float(n), repr(v) if not math.isnan(v) else "nan") for n, v in enumerate(values, 1)]
    raw = path.read_bytes()
    path.write_bytes(raw[: max(0, len(raw) - cut)])
    kept = jsonl.read(path)
    restored = data.draw(st.integers(0, len(kept)))
    write(path, values, restored, restored)
    assert seen(path) == whole
