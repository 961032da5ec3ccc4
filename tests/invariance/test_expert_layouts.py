"""Checksums cover experts as kernels for GPUs keep them: vLLM's workers, its reload and its conversions, on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make
from engine_workers import Nursery, Workers
from expert_kernels import CUTLASS, TENSORRT, TRITON
from launch import free_port, launch
from test_sharded_push import DTYPE, of_file, unlike

from stare_megatron.sync.check import added, first_difference, merge_shards

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1200)

# Where TensorRT-LLM's kernel has 24 rows for gate and 24 for up it keeps 128 for each.
ENGINES = {
    "triton, experts split": (TRITON, 2, True),
    "cutlass, matrices split": (CUTLASS, 2, False),
    "tensorrt, matrices split": (TENSORRT, 2, False),
}
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("workers"))) as made:
        yield made


@pytest.fixture(scope="module")
def model(nursery: Nursery) -> Path:
    return make("qwen3_moe", nursery.folder)


@pytest.fixture(scope="module")
def engines(nursery: Nursery, model: Path) -> dict[str, Workers]:
    return {
        name: nursery.start(f"engine-{i}", model, workers, DTYPE, split, kernel)
        for i, (name, (kernel, workers, split)) in enumerate(ENGINES.items())
    }


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, engines: dict[str, Workers]) -> Workers:
    found = engines[request.param]
    assert found.call("kernels") == [{ENGINES[request.param][0]}] * found.count
    return found


def whole(engine: Workers) -> dict[str, str]:
    return merge_shards(engine.call("pieces"))


def test_experts_that_were_loaded_are_told(engine: Workers, model: Path) -> None:
    engine.call("load_with_swapped_rows", "model.norm.weight", 0, 0, 1)  # the checkpoint, again
    assert whole(engine) == of_file(model)


@pytest.mark.parametrize(
    "instead",
    [
        {EXPERT.format(3, "down"): None},
        {EXPERT.format(0, "gate"): None},
        {EXPERT.format(1, "up"): EXPERT.format(2, "up"), EXPERT.format(2, "up"): EXPERT.format(1, "up")},
        {EXPERT.format(2, "down"): EXPERT.format(2, "down").replace("layers.1", "layers.0")},
        {EXPERT.format(2, "gate"): EXPERT.format(2, "up"), EXPERT.format(2, "up"): EXPERT.format(2, "gate")},
        {EXPERT.format(i, kind): EXPERT.format((i + 2) % 4, kind) for i in range(4) for kind in ("gate", "up", "down")},
    ],
    ids=["dropped", "half dropped", "swapped", "of another layer", "gate and up swapped", "of the other worker"],
)
def test_what_does_not_arrive_or_arrives_elsewhere_is_named(engine: Workers, instead: dict[str, str | None]) -> None:
    ours = engine.call("load_random", 1, {})[0]
    assert whole(engine) == ours
    ours = engine.call("load_random", 2, instead)[0]
    theirs = whole(engine)
    assert {name for name in ours if theirs[name] != ours[name]} == instead.keys()
    assert first_difference(ours, theirs) in instead


def test_a_push_in_shards_is_told_and_what_is_wrong_after_it(engine: Workers, model: Path) -> None:
    engine.call("load_with_swapped_rows", "model.norm.weight", 0, 0, 1)
    loaded = engine.call("state")
    engine.call("load_random", 3, {})
    assert unlike(engine, loaded)
    case = {"path": model, "trainer": {}, "engines": [engine], "port": free_port(), "places": None}
    ((pushed,),) = launch("push_cases:run", 1, {"cases": [case]})
    assert unlike(engine, loaded) == []
    ours = added([pushed.sums[engine.name]])

    def told() -> dict[str, str]:
        return {label: value for worker in engine.call("sums") for label, value in worker.items()}

    assert told() == ours
    assert whole(engine) == of_file(model)
    for parameter, kinds in (("w13_weight", ("gate", "up")), ("w2_weight", ("down",))):
        engine._one(1, "swap_experts", (parameter, 0, 1))  # in the memory that its kernel reads
        for wanted, theirs in ((ours, told()), (of_file(model), whole(engine))):
            wrong = {name.partition("[")[0] for name in wanted if theirs[name] != wanted[name]}
            assert {name.split(".")[-2] for name in wrong} == {f"{kind}_proj" for kind in kinds}
            assert len({name.split(".")[5] for name in wrong}) == 2
        engine._one(1, "swap_experts", (parameter, 0, 1))


def test_a_worker_that_takes_experts_for_others_is_named(engines: dict[str, Workers], model: Path) -> None:
    engine = engines["triton, experts split"]
    engine.call("load_with_swapped_rows", "model.norm.weight", 0, 0, 1)
    engine.call("turn_expert_map", 1)
    ours, theirs = of_file(model), whole(engine)
    engine.call("turn_expert_map", -1)
    assert str(first_difference(ours, theirs)).startswith("model.layers.1.mlp.experts.")
    assert sum(theirs[name] != ours[name] for name in ours) == 12
    assert whole(engine) == ours
