"""Any value of any key, in a file or as an override, ends at the door in one line, or in a run that can start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stare_megatron.config import Config, load, parse
from stare_megatron.config import upstream as options
from stare_megatron.errors import UserError
from stare_megatron.host import device, ports
from stare_megatron.run import machine, preflight
from stare_megatron.run.folder import to_toml
from tests.configs import small_model
from tests.properties import SCALARS, TEXT, bounded, nested
from tests.unit.config import probes
from tests.unit.config.test_config_properties import KEYS, with_value

VALUES = nested(SCALARS) | st.sampled_from(
    ["~/x", "~nobody_here/x", "$HOME/x", "${UNSET_VARIABLE}/x", "a/../b", ".", "true", "1", "1e3", "math", "GRPO",
     [""], ["a", "a"],
     [], {}, 1e-320, 1e308, -0.0, 2**31, 2**63, 10**30, "HOST:1", "é" * 300 + ":80", ":::", "[::1]:80"]
)  # fmt: skip
UPSTREAM = [f"trainer.megatron.{key}" for key in sorted(options.megatron_fields())] + [
    f"inference.vllm.{key}" for key in sorted(options.engine_arg_names())
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARE_DEVICE", "cpu")
        patch.delenv("UNSET_VARIABLE", raising=False)
        patch.setattr(preflight, "check_packages", lambda: None)  # reads every distribution
        memory = machine.psutil.virtual_memory()._replace(total=2**40, available=2**40)
        patch.setattr(machine.psutil, "virtual_memory", lambda: memory)
        patch.setattr(ports, "_CONNECT_S", 0.01)
        device.gpu_names.cache_clear()
        yield {
            "run": {"steps": 6, "dir": str(folder / "runs")},
            "model": {"path": str(small_model(folder / "model"))},
            "data": {"train": [str(probes.rows(folder / "train.jsonl"))], "max_prompt_tokens": 8},
            "reward": {"name": "exact"},
            "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 24},
        }


def door(make: Any) -> Config | None:
    """What `make` returns, if it passes the door; None if it is refused in one line."""
    try:
        made: Config = make()
        preflight.check(made)
    except UserError as e:
        said = str(e)
    else:
        return made
    assert said.encode()
    assert "\n" not in said
    assert len(said) < 3000
    return None


@bounded(500)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.sampled_from(UPSTREAM), VALUES), min_size=1, max_size=2))
@example([("cluster.address", "é" * 300 + ":80")])
@example([("trainer.megatron", {"expert_tensor_parallel_size": "abc"})])
@example([("inference.vllm", {"block_size": 1e308})])
@example([("data.train", "\0")])
@example([("model.path", "x" * 5000)])
@example([("model.path", "~nobody_here/x")])
@example([("data.train", ["x" * 300 + ".jsonl"])])
def test_any_value_of_any_key(base: dict[str, Any], items: list[tuple[str, Any]]) -> None:
    tree = base
    for key, value in items:
        tree = with_value(tree, key, value)
    made = door(lambda: parse(tree, "file"))
    if made is not None:
        assert to_toml(made)
        assert made.folder.is_absolute()


@bounded(150)
@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS) | st.sampled_from(UPSTREAM), TEXT | VALUES.map(str)),
        max_size=2,
    )
)
@example(items=[("data.train", "0\n0")])
def test_any_override(base: dict[str, Any], tmp_path_factory: Any, items: list[tuple[str, str]]) -> None:
    file = Path(base["run"]["dir"]).parent / "run.toml"
    if not file.exists():
        file.write_text(to_toml(parse(base, "base")))
    door(lambda: load(file, [f"{key}={value}" for key, value in items]))


def test_the_base_passes(base: dict[str, Any]) -> None:
    assert door(lambda: parse(json.loads(json.dumps(base)), "base")) is not None


@pytest.mark.parametrize("key", ["run.steps", "trainer.optimizer.lr", "data.shuffle", "data.train", "inference.vllm"])
def test_numbers_that_python_does_not_print(base: dict[str, Any], key: str) -> None:
    value = {"max_num_seqs": [10**5000]} if key == "inference.vllm" else 10**5000
    assert door(lambda: parse(with_value(base, key, value), "file")) is None
