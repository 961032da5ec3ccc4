"""Sharded pushes from real Megatron-Core ranks into vLLM's own workers: every layout of the one into every layout of
the other leaves what loading the checkpoint leaves, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import EXPERTS, make
from engine_workers import Nursery, Workers
from launch import free_port, launch
from safetensors.torch import load_file

from stare_megatron.models.families import read_hf_config
from stare_megatron.sync.check import added, checksum, first_difference, merge_shards

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)

LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "VPP": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "DP2": {},
    "EP2": {"expert_parallel": 2},
    # Of four ranks.
    "TP2 x PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "TP2 x EP2": {
        "tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2,
        "megatron": {"expert_tensor_parallel_size": 1},
    },
}  # fmt: skip
TWO_RANKS = [name for name in LAYOUTS if " x " not in name]


@dataclass(frozen=True)
class Where:
    """`ranks`: (machine, GPU) of each; None: as it is. `worker`: of that which is on GPU g, if there are GPUs; of two
    engines of one worker the second is on the second one. `carriers`: between them."""

    ranks: list[tuple[str, str]] | None
    worker: Callable[[int], tuple[str, str]]
    carriers: set[str]


HERE = Where(None, lambda g: ("", ""), {"MAPPED"})
APART = Where([("ranks", "")] * 2, lambda g: ("workers", ""), {"GLOO"})
SHARED_GPUS = Where([("here", "GPU-0"), ("here", "GPU-1")], lambda g: ("here", f"GPU-{g}"), {"IPC", "NCCL"})
OTHER_GPUS = Where([("ranks", "GPU-0"), ("ranks", "GPU-1")], lambda g: ("workers", f"GPU-{8 + g}"), {"NCCL"})
PLACES = {
    ("TP2", "qwen2"): SHARED_GPUS,
    ("TP2", "qwen3_moe"): APART,
    ("TP2", "llama"): APART,
    ("PP2", "qwen2"): OTHER_GPUS,
    ("PP2", "qwen3_moe"): SHARED_GPUS,
    ("VPP", "llama"): OTHER_GPUS,
    ("DP2", "qwen3"): SHARED_GPUS,
    ("DP2", "llama"): APART,
    ("EP2", "qwen3_moe"): OTHER_GPUS,
}
MODELS = ("qwen2", "qwen3_moe")  # tied, with biases; experts
OTHERS = ("qwen3", "llama")
# Other names and stacks in the files, each by the layout that says most of it.
MORE = (("mistral", "PP2"), ("phi3", "TP2"), ("qwen2_moe", "TP2"))
DTYPE = "bfloat16"


class Engines:
    """Of one model: two engines of a worker each, one of two, and one of two that split experts."""

    def __init__(self, nursery: Nursery, name: str, path: Path) -> None:
        self.path = path
        self.all = [nursery.start(f"{name}-{i}", path, 1, DTYPE) for i in "ab"]
        self.all.append(nursery.start(f"{name}-tp2", path, 2, DTYPE))
        if name in EXPERTS:
            self.all.append(nursery.start(f"{name}-ep2", path, 2, DTYPE, expert_parallel=True))
        self.loaded = {engine.name: engine.call("state") for engine in self.all}

    def be_at(self, where: Where) -> None:
        for i, engine in enumerate(self.all):
            for w in range(engine.count):
                engine._one(w, "be_at", where.worker(w + (i == 1)))

    def scramble(self, seed: int) -> None:
        for engine in self.all:
            engine.call("scramble", seed)
            assert unlike(engine, self.loaded[engine.name])


def unlike(engine: Workers, states: list[dict[str, np.ndarray]]) -> list[str]:
    """What an engine's workers have otherwise than `states`."""
    return [
        f"{name} of worker {w}"
        for w, (now, then) in enumerate(zip(engine.call("state"), states, strict=True))
        for name in then
        if not np.array_equal(now[name], then[name])
    ]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("workers"))) as made:
        yield made


@pytest.fixture(scope="module")
def engines(nursery: Nursery) -> dict[str, Engines]:
    return {name: Engines(nursery, name, make(name, nursery.folder)) for name in MODELS}


@pytest.fixture(scope="module")
def other_engines(nursery: Nursery) -> dict[str, Engines]:
    return {name: Engines(nursery, name, make(name, nursery.folder)) for name in OTHERS}


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_every_engine_has_what_loading_the_checkpoint_gives_it(layout: str, engines: dict[str, Engines]) -> None:
    push_and_compare(layout, {name: e for name, e in engines.items() if layout != "EP2" or name == "qwen3_moe"})


@pytest.mark.runs
@pytest.mark.parametrize("layout", [name for name in TWO_RANKS if name != "EP2"])
def test_so_have_those_of_other_dense_models(layout: str, other_engines: dict[str, Engines]) -> None:
    push_and_compare(layout, other_engines)


@pytest.mark.runs
@pytest.mark.parametrize(("layout", "name"), [("TP2 x PP2", "qwen2"), ("TP2 x EP2", "qwen3_moe")])
def test_so_it_has_where_kinds_of_parallelism_meet(layout: str, name: str, engines: dict[str, Engines]) -> None:
    push_and_compare(layout, {name: engines[name]}, ranks=4)


@pytest.mark.parametrize(
    ("name", "layout"), [("mixtral", "EP2"), *(pytest.param(*case, marks=pytest.mark.runs) for case in MORE)]
)
def test_so_has_every_other_family(name: str, layout: str, nursery: Nursery) -> None:
    e = Engines(nursery, name, make(name, nursery.folder))
    push_and_compare(layout, {name: e})
    for engine in e.all:
        engine.call("end")


def push_and_compare(layout: str, chosen: dict[str, Engines], ranks: int = 2) -> None:
    cases = []
    for name, e in chosen.items():
        e.scramble(list(LAYOUTS).index(layout))
        where = PLACES.get((layout, name), HERE)
        e.be_at(where)
        cases.append(
            {"path": e.path, "trainer": LAYOUTS[layout], "engines": e.all, "port": free_port(), "places": where.ranks}
        )
    by_rank = launch("push_cases:run", ranks, {"cases": cases})
    for i, (name, e) in enumerate(chosen.items()):
        pushed = [found[i] for found in by_rank]
        assert [r.unlike for r in pushed] == [[]] * ranks
        for engine in e.all:
            assert unlike(engine, e.loaded[engine.name]) == [], (name, engine.name)
            theirs = {label: value for worker in engine.call("sums") for label, value in worker.items()}
            ours = added(r.sums[engine.name] for r in pushed)
            assert ours.keys() == theirs.keys()  # experts' and biases' boxes, too
            assert first_difference(ours, theirs) is None
            whole, file = merge_shards(engine.call("pieces")), of_file(e.path)
            assert whole.items() <= file.items()
            assert {key.split(".")[-2] for key in file.keys() - whole.keys()} <= {"qkv_proj", "gate_up_proj"}
            assert engine.call("gpu_in_use") == [0] * engine.count
            assert engine.call("unused_packed") == [[]] * engine.count
        assert [r.in_use for r in pushed] == [0] * ranks
        used = {carrier for r in pushed for carriers in r.carriers.values() for carrier in carriers}
        assert used == PLACES.get((layout, name), HERE).carriers
        needed = sum(sum(engine.call("needed_bytes")) for engine in e.all)
        assert sum(r.sent for r in pushed) == needed
        if layout == "DP2":  # replicas share the work
            assert max(r.sent for r in pushed) < 0.6 * needed


def of_file(path: Path) -> dict[str, str]:
    """Checksums of the checkpoint's tensors: what is compared where they are pushed whole."""
    tensors = load_file(path / "model.safetensors").items()
    return {name: checksum(tensor.to(torch.__dict__[DTYPE])) for name, tensor in tensors}


@pytest.mark.parametrize("matrix", ["gate_proj", "up_proj", "down_proj"])
def test_rows_of_an_expert_that_changed_places_are_named_where_tensors_are_whole(
    matrix: str, engines: dict[str, Engines]
) -> None:
    e = engines["qwen3_moe"]
    name = f"model.layers.1.mlp.experts.3.{matrix}.weight"
    ours = of_file(e.path)
    for engine in e.all:
        engine.call("load_with_swapped_rows", name, 0, 8, 8)
        theirs = merge_shards(engine.call("pieces"))
        assert [label for label in ours if ours[label] != theirs[label]] == [name]


def test_rows_that_changed_places_are_named_with_worker_and_box(engines: dict[str, Engines]) -> None:
    e = engines["qwen2"]
    engine = e.all[2]
    e.be_at(HERE)
    case = {"path": e.path, "trainer": {}, "engines": [engine], "port": free_port(), "places": None}
    ((pushed,),) = launch("push_cases:run", 1, {"cases": [case]})
    engine._one(1, "swap_rows", ("model.embed_tokens", 0, 16, 16))
    theirs = {label: value for worker in engine.call("sums") for label, value in worker.items()}
    named = first_difference(added([pushed.sums[engine.name]]), theirs)
    assert named == "model.embed_tokens.weight[64:112, 0:128] of worker 1"


def test_query_heads_that_changed_places_are_named_with_worker_and_box(engines: dict[str, Engines]) -> None:
    """The last two, both of the second worker, in a matrix that vLLM keeps fused with keys and values, and packed."""
    e = engines["qwen2"]
    engine = e.all[2]
    e.be_at(HERE)
    case = {"path": e.path, "trainer": {}, "engines": [engine], "port": free_port(), "places": None}
    ((pushed,),) = launch("push_cases:run", 1, {"cases": [case]})
    shape = read_hf_config(e.path)
    size, last = shape.head_dim, (shape.heads - 1) * shape.head_dim
    name = "model.layers.1.self_attn.q_proj.weight"
    engine.call("load_with_swapped_rows", name, last - size, last, size)
    theirs = {label: value for worker in engine.call("sums") for label, value in worker.items()}
    ours = added([pushed.sums[engine.name]])
    half, rows = shape.heads * size // 2, shape.heads * size
    assert first_difference(ours, theirs) == f"{name}[{half}:{rows}, 0:{shape.hidden}] of worker 1"
    assert [label for label in ours if ours[label] != theirs[label]] == [first_difference(ours, theirs)]


def test_a_late_engine_gets_a_push_of_its_own_and_one_that_dies_in_a_push_is_named(
    nursery: Nursery, engines: dict[str, Engines]
) -> None:
    """Ruins an engine of its own."""
    e = engines["qwen2"]
    first, second = nursery.start("mortal", e.path, 1, DTYPE), e.all[1]
    e.be_at(HERE)
    e.scramble(7)
    arguments = {"path": e.path, "port": free_port(), "first": first, "second": second}
    (said,) = launch("push_cases:faults", 1, arguments)
    assert said[0].startswith(("RunError: mortal", "EOFError")), said
    assert said[1] == ""
    assert unlike(second, e.loaded[second.name]) == []
    assert unlike(e.all[0], e.loaded[e.all[0].name])  # which had no part in it
