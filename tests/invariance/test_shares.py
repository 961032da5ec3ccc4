"""Every data-parallel rank writes and reads its share, and the checkpoint is the one that Megatron-Core would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import launch
from step_cases import make_checkpoint
from test_saving import layout, same

DP4 = layout(4)
MIB = 2**20


def model(family: str, folder: Path) -> Path:
    return make_checkpoint(folder / family) if family == "tied" else checkpoints.make(family, folder)


def sizes(folder: Path) -> list[int]:
    """Bytes that each rank wrote."""
    by_rank: dict[str, int] = {}
    for file in folder.glob("*.distcp"):
        rank = file.name.split("_")[2]
        by_rank[rank] = by_rank.get(rank, 0) + file.stat().st_size
    return sorted(by_rank.values())


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("tied", layout(2, pipeline_parallel=2)),
        ("qwen3_moe", layout(4, expert_parallel=2)),
        pytest.param("tied", DP4, marks=pytest.mark.slow),
        pytest.param("llama", layout(4, tensor_parallel=2, context_parallel=2), marks=pytest.mark.slow),
        pytest.param("tied", layout(2, distributed_optimizer=False), marks=pytest.mark.slow),
        pytest.param("tied", DP4 | {"model": {"dtype": "bfloat16"}}, marks=pytest.mark.slow),
    ],
    ids=["PP2", "EP2", "DP4", "TP2-CP2", "whole-optimizer", "bfloat16"],
)
def test_the_same_as_upstreams_and_both_are_read(tmp_path, family, shape: dict[str, Any]) -> None:
    shape = {"model": {"path": ""}} | shape
    path = model(family, tmp_path)
    shape["model"] = {"dtype": "float32"} | shape["model"] | {"path": str(path)}
    arguments = {"checkpoint": path, "layout": shape, "folder": tmp_path}
    found = launch("share_cases:upstreams", shape["trainer"]["world_size"], arguments)
    assert all(stats == ranks[0] for ranks in found for stats in ranks)
    assert same(tmp_path / "shares", tmp_path / "whole")


def test_another_number_of_data_parallel_ranks(tmp_path) -> None:
    """4 ranks to 2 with whole optimizers to 4: bit for bit, and each rank writes as much as any other."""
    path = model("tied", tmp_path)
    stats = []
    for source, out, shape in ((None, "four", DP4), ("four", "two", layout(2)), ("two", "back", DP4)):
        origin = tmp_path / source if source else None
        arguments = {"checkpoint": path, "layout": shape, "source": origin, "out": tmp_path / out}
        ranks = shape["trainer"]["world_size"]
        stats.append(launch("share_cases:between", ranks, arguments)[0][0])
        written = sizes(tmp_path / out)
        assert len(written) == ranks
        assert written[0] > 0.8 * written[-1], written
    assert same(tmp_path / "four", tmp_path / "two")
    assert same(tmp_path / "four", tmp_path / "back")
    assert stats[0] == stats[2]
    assert stats[1]["update/loss"] == pytest.approx(stats[0]["update/loss"], abs=1e-6)


def test_memory_is_bounded_by_a_ranks_share(tmp_path) -> None:
    """At 4 data-parallel ranks: what is held beside the state is no more than the share that is written, and the
    largest parameter; of the state of all ranks it would be 224 MiB."""
    parameters, largest = 14 * 2**20, 3 * 2**20
    path = _wide(tmp_path / "wide")
    arguments = {"checkpoint": path, "layout": DP4, "out": tmp_path}
    share = parameters * (4 + 12) // 4  # model, master weights and moments in float32
    for found in launch("share_cases:memory", 4, arguments):
        for what, held in found.items():
            assert held < share + largest * 4 + 16 * MIB, (what, held / MIB, share / MIB)


def _wide(folder: Path) -> Path:
    """A Qwen2 of 14 Mi parameters in 2 layers, the largest of 3 Mi."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=112,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
