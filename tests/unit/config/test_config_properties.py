"""Whatever is given as a configuration ends in a Config or in one line; what is written of a Config reads back."""

from __future__ import annotations

import datetime
import tempfile
import tomllib
import typing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from stare_megatron.config import Config, Section, all_keys, load, parse, section_of
from stare_megatron.config.methods import METHODS
from stare_megatron.errors import UserError
from stare_megatron.run.folder import to_toml
from tests.properties import SCALARS, TEXT, bounded, nested

BASE: dict[str, Any] = {
    "run": {"steps": 1},
    "model": {"path": "m"},
    "data": {"train": ["a.jsonl"]},
    "reward": {"name": "exact"},
}
KEYS = sorted(all_keys())
TABLES = sorted({key.rpartition(".")[0] for key in KEYS} - {""})
VALUES = nested(SCALARS | st.just(datetime.date(2026, 1, 1)))


def with_value(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a nested mapping with one more value; what stands in its way is replaced."""
    head, _, rest = key.partition(".")
    if not rest:
        return tree | {head: value}
    inner = tree.get(head)
    return tree | {head: with_value(inner if isinstance(inner, dict) else {}, rest, value)}


def outcome(make: Any) -> Config | None:
    """What `make` returns; None if it refuses in one line that can be printed."""
    try:
        return make()
    except UserError as e:
        said = str(e)
    assert said.encode()
    assert "\n" not in said
    return None


def reads_back(config: Config | None) -> None:
    if config is not None:
        # Settings of methods that are not used are left out.
        assert parse(tomllib.loads(to_toml(config)), "written").model_dump() == config.model_dump()


@bounded(150)
@given(st.lists(st.tuples(st.sampled_from(KEYS + TABLES) | TEXT, VALUES), min_size=1, max_size=3))
@example([("algorithm.method", [1])])
@example([("env.final_answer", "(?:a){99999999999999999999}")])
@example([("env.final_answer", "(" * 5000)])
@example([("trainer.megatron", {"x": float("nan")})])
@example([("trainer.megatron", {"x": datetime.date(2026, 1, 1)})])
@example([("inference.vllm", {"x": ["\ud800", None]})])
@example([("run.dir", "\ud800")])
def test_any_values_of_any_keys(items: list[tuple[str, Any]]) -> None:
    tree = BASE
    for key, value in items:
        tree = with_value(tree, key, value)
    reads_back(outcome(lambda: parse(tree, "file")))


@bounded(150)
@given(
    st.text(st.characters(), max_size=60)
    | st.lists(st.tuples(st.sampled_from([*KEYS, *TABLES, "a.b"]), TEXT | st.integers().map(str)), max_size=3).map(
        lambda items: "".join(f"{key} = {value}\n" for key, value in items)
    ),
    st.lists(st.tuples(st.sampled_from([*KEYS, *TABLES]) | TEXT, TEXT | VALUES.map(str)), max_size=3),
)
@example("run.steps = " + "9" * 5000, [])
@example("run.steps = " + "[" * 5000, [])
@example("", [("run.steps", "9" * 5000), ("model.path", "[" * 5000)])
@example("run.steps = 1", [("run", "1"), ("run.steps.more", "1")])
@example("", [("run.dir", "\udcff")])
def test_any_file_and_any_overrides(text: str, overrides: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.toml")
        path.write_bytes(text.encode("utf-8", "surrogateescape" if "\udcff" in text else "replace"))
        needed = ["run.steps=1", "model.path=m", "data.train=['a.jsonl']", "reward.name=exact"]
        reads_back(outcome(lambda: load(path, [*needed, *(f"{key}={value}" for key, value in overrides)])))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"run.name = '\xff'")
    assert outcome(lambda: load(path, [])) is None


def values_of(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Mostly valid values of a setting, from its type and its bounds."""
    low = max((m.ge if isinstance(m, Ge) else m.gt for m in field.metadata if isinstance(m, Ge | Gt)), default=0)
    kind: Any = field.annotation
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(low), int(low) + 64)
    if kind is float:
        return st.floats(float(low), float(low) + 1, exclude_min=True)
    if kind in (str, Path):
        return st.text("aZ09._-\\\"' é\n", max_size=6)
    return st.just(field.get_default(call_default_factory=True))


def settings_of(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        name: values_of(field) for name, field in section.model_fields.items() if section_of(field.annotation) is None
    }
    return st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=3).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )


SECTIONS = {name: kind for name, field in Config.model_fields.items() if (kind := section_of(field.annotation))}


@bounded(120)
@given(
    st.dictionaries(st.sampled_from(sorted(SECTIONS)), st.data(), min_size=1, max_size=2),
    st.sampled_from(sorted(METHODS)),
)
def test_valid_settings_are_written_and_read_back(chosen: dict[str, Any], method: str) -> None:
    tree = BASE | {"algorithm": {"method": method}}
    for name, data in chosen.items():
        tree = tree | {name: tree.get(name, {}) | data.draw(settings_of(SECTIONS[name]))}
    reads_back(outcome(lambda: parse(tree, "file")))


def test_most_tables_made_here_are_valid() -> None:
    """Else the property above says little."""
    accepted: dict[str, int] = {}

    @bounded(8)
    @given(st.data())
    def count(data: Any) -> None:
        for name, kind in SECTIONS.items():
            tree = BASE | {name: BASE.get(name, {}) | data.draw(settings_of(kind))}
            accepted[name] = accepted.get(name, 0) + (outcome(partial(parse, tree, "file")) is not None)

    count()
    assert min(accepted.values()) > 0, accepted
