"""Hugging Face -> Megatron-Core -> any layout -> Megatron-Core -> Hugging Face, bit for bit, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import free_port, launch
from rich.console import Console
from safetensors.torch import load_file

from stare_megatron.convert.plan import ParallelLayout
from stare_megatron.convert.run import Options, convert
from stare_megatron.convert.torch_dist import TorchDist
from stare_megatron.convert.verify import Logits, compare_logits
from stare_megatron.tasks.smollm2 import make_smollm2

TP2 = {"tensor_parallel": 2}
PP2 = {"pipeline_parallel": 2}
VPP2 = PP2 | {"virtual_pipeline": 2}
EP2 = {"expert_parallel": 2}
SP = {"sequence_parallel": True}
ETP1 = {"megatron": {"expert_tensor_parallel_size": 1}}
QUIET = Console(quiet=True)

ALL = [*checkpoints.FAMILIES, *checkpoints.VARIANTS]
MOE = checkpoints.EXPERTS
ONE_RANK = [("llama", {}), ("qwen3_moe", {})]
TWO_RANKS = [
    *((name, TP2) for name in checkpoints.FAMILIES),
    *((name, VPP2) for name in checkpoints.VARIANTS),
    ("qwen3_moe", EP2),
    ("qwen3_moe_tied", EP2 | TP2 | SP | ETP1),
    ("mixtral", EP2 | TP2 | SP | ETP1),
    ("qwen2_moe", EP2 | TP2 | SP | ETP1),
]
SLOW_TWO_RANKS = [(name, layout) for name in ALL for layout in (TP2, PP2, VPP2)] + [(name, EP2) for name in MOE]
SLOW_FOUR_RANKS = [(name, TP2 | VPP2) for name in ALL] + [(name, PP2 | EP2) for name in MOE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


def to_mcore(folder: Path, name: str, cut: int) -> tuple[Path, Path]:
    """The checkpoint `name` and its conversion, cut for `cut` tensor-parallel ranks; made once."""
    hf, mcore = folder / name, folder / f"{name}-mcore-{cut}"
    if not hf.exists():
        checkpoints.make(name, folder)
    if not mcore.exists():
        convert(Options(hf, mcore, layout=ParallelLayout(tensor_parallel=cut)), QUIET)
    return hf, mcore


def assert_same(one: Path, other: Path) -> None:
    """Names and bytes of all tensors."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert value.numpy().tobytes() == b[name].numpy().tobytes(), name


def round_trip(folder: Path, cases: list[tuple[str, dict[str, Any]]], ranks: int, *, cut: int, **more: Any) -> None:
    prepared = []
    for i, (name, layout) in enumerate(cases):
        hf, mcore = to_mcore(folder, name, cut)
        out = folder / f"{name}-{ranks}-{i}-saved"
        prepared.append(
            {"hf": str(hf), "mcore": str(mcore), "out": str(out), "trainer": layout, "port": free_port()} | more
        )
    by_rank = launch("convert_worker:run", ranks, {"cases": prepared})
    for case, different in zip(prepared, zip(*by_rank, strict=True), strict=True):
        assert list(different) == [[]] * ranks, f"{case}: loaded otherwise than from Hugging Face"
        if not more:
            back = Path(case["out"] + "-hf")
            convert(Options(Path(case["out"]), back, hf=Path(case["hf"])), QUIET)
            assert_same(Path(case["hf"]), back)


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(folder: Path, name: str) -> None:
    """Without Megatron-Core in between; cut for two ranks, and for one."""
    for cut in (1, 2):
        hf, mcore = to_mcore(folder, name, cut)
        back = folder / f"{name}-back-{cut}"
        convert(Options(mcore, back), QUIET)
        assert_same(hf, back)


def test_one_rank(folder: Path) -> None:
    round_trip(folder, ONE_RANK, 1, cut=2)


def test_two_ranks(folder: Path) -> None:
    round_trip(folder, TWO_RANKS, 2, cut=1)


@pytest.mark.slow
def test_two_ranks_wide(folder: Path) -> None:
    round_trip(folder, SLOW_TWO_RANKS, 2, cut=2)


@pytest.mark.slow
def test_four_ranks_wide(folder: Path) -> None:
    round_trip(folder, SLOW_FOUR_RANKS, 4, cut=1)


def test_training_checkpoint_without_its_optimizer(folder: Path) -> None:
    """A training checkpoint of two ranks becomes the policy it holds, and no byte of the optimizer's state is read: it
    is overwritten before."""
    round_trip(folder, [("qwen2", TP2)], 2, cut=1, optimizer=True)
    saved = folder / "qwen2-2-0-saved"
    step = folder / "run" / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    saved.rename(step / "trainer")
    (step / "loop.json").write_text("{}")
    (step.parent / "latest").write_text("step_000001\n")
    (folder / "run" / "config.toml").write_text(f'[model]\npath = "{folder / "qwen2"}"\n')
    dist = TorchDist(step / "trainer")
    state = [key for key in dist.tensors if key.startswith("optimizer.")]
    assert len(state) == 3 * len(set(dist.tensors) - set(state)), "parameter and two moments each"
    for key in state:
        for piece in dist.pieces(key):
            with (step / "trainer" / piece.file).open("r+b") as f:
                f.seek(piece.offset)
                f.write(b"\xff" * piece.length)
    convert(Options(folder / "run", folder / "policy"), QUIET)
    start, trained = load_file(folder / "qwen2/model.safetensors"), load_file(folder / "policy/model.safetensors")
    assert start.keys() == trained.keys()
    for name, value in trained.items():
        # Adam's first step is the learning rate in the gradient's direction.
        assert (value - start[name]).mean().item() == pytest.approx(-1e-3, rel=0.2), name
    assert (folder / "policy" / "config.json").is_file()


def test_logits_of_both_sides(folder: Path) -> None:
    """What `--verify` compares, for a family with experts; and that it notices other weights."""
    hf, mcore = to_mcore(folder, "qwen3_moe", 1)
    found = compare_logits(hf, mcore)
    assert found.same
    assert found.difference < 1e-5
    assert found.tokens == 64
    assert not Logits(found.difference + 1e-2, found.largest, found.tokens).same


@pytest.mark.slow
def test_the_real_pretrained_checkpoint(folder: Path) -> None:
    """SmolLM2-135M: there and back bit for bit, tokenizer and chat template included, and the same logits."""
    pytest.importorskip("gguf")
    make_smollm2(folder / "smollm2", padded=True, train_prompts=4, eval_prompts=4)
    hf, mcore, back = folder / "smollm2/model", folder / "smollm2-mcore", folder / "smollm2-back"
    convert(Options(hf, mcore, layout=ParallelLayout(tensor_parallel=2)), QUIET)
    convert(Options(mcore, back), QUIET)
    assert_same(hf, back)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (hf / name).read_bytes()
    found = compare_logits(hf, mcore)
    assert found.same, found
