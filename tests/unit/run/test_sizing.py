"""Settings that follow from the model and the load."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.utils import request_memory

from stare_megatron.config import Config
from stare_megatron.data.benchmarks import Benchmark
from stare_megatron.errors import UserError
from stare_megatron.models import weights
from stare_megatron.models.shape import Experts, ModelShape
from stare_megatron.run import folder as run_folder
from stare_megatron.run import sizing
from tests.configs import configuration

H100 = 81559 * 2**20
OF_RANK = 1_904_057_344
"""Parameters of a rank of the layout of `make`, as Megatron-Core counts them (test_plan_layouts.py)."""
B7 = ModelShape(
    family="qwen2", layers=28, hidden=3584, ffn=18944, heads=28, kv_groups=4, head_dim=128, vocab=152064, tied=False,
    qkv_bias=True, qk_norm=False, norm_eps=1e-6, max_positions=32768, rope_theta=1e6, rope_scaling=None, experts=None,
)  # fmt: skip


@pytest.fixture(autouse=True)
def parameters(monkeypatch) -> dict[str, int]:
    """7.6 billion, unless a test changes it."""
    count = {"n": 7_600_000_000}
    monkeypatch.setattr(run_folder, "parameter_count", lambda _: count["n"])
    return count


def make(vllm: dict[str, Any] | None = None, **tables: dict[str, Any]) -> Config:
    """The layout of examples/tool_use_7b."""
    base: dict[str, dict[str, Any]] = {
        "rollout": {"prompts_per_step": 192, "group_size": 8, "dynamic_sampling": True},
        "trainer": {"world_size": 16, "tensor_parallel": 4},
        "inference": {"engines": 16, "vllm": vllm or {}},
    }
    return configuration(**{k: base.get(k, {}) | tables.get(k, {}) for k in {*base, *tables}})


def chosen(config: Config, gpu_bytes: int = H100, *, trainers: bool = True) -> dict[str, Any]:
    load = sizing.rollout_load(config)
    return sizing.with_engine_sizes(config, B7, gpu_bytes, load, trainers=trainers).inference.vllm


def test_time_limits_grow_with_the_model_and_can_be_set(parameters):
    small, large = make(), make()
    parameters["n"] = 100_000
    small = sizing.with_time_limits(small)
    assert (small.cluster.start_timeout, small.sync.push_timeout) == (
        pytest.approx(600, abs=1),
        pytest.approx(300, abs=1),
    )
    parameters["n"] = 32_000_000_000
    large = sizing.with_time_limits(large)
    assert large.cluster.start_timeout == pytest.approx(1240)
    assert large.sync.push_timeout == pytest.approx(940)
    assert large.watchdog.first == pytest.approx(2440)
    settings = make(cluster={"start_timeout": 60.0}, sync={"push_timeout": 7.0}, watchdog={"first": 8.0})
    own = sizing.with_time_limits(settings)
    assert (own.cluster.start_timeout, own.sync.push_timeout, own.watchdog.first) == (60.0, 7.0, 8.0)


def test_batches_hold_an_engines_share_of_the_load():
    assert chosen(make())["max_num_seqs"] == 104  # 192 x 8 / 16, and one group more
    assert chosen(make())["max_num_batched_tokens"] == 8192
    assert chosen(make(inference={"engines": 1}))["max_num_seqs"] == 1024
    assert chosen(make(vllm={"max_num_batched_tokens": 64}))["max_num_seqs"] == 64  # vLLM wants it so
    assert chosen(make(vllm={"max_num_seqs": 9000}))["max_num_batched_tokens"] == 9000
    assert "max_num_batched_tokens" not in chosen(make(vllm={"enable_chunked_prefill": False}))


@pytest.mark.parametrize(
    ("prompts", "samples", "engines", "wanted"),
    [(30, 32, 8, 152), (500, 1, 1, 504), (2000, 32, 8, 1024), (1, 1, 1, 8), (20, 16, 2, 176)],
)
def test_an_evaluation_alone_is_sized_by_its_own_load(prompts, samples, engines, wanted):
    config = make(rollout={"prompts_per_step": 8, "group_size": 2}, inference={"engines": engines})
    benchmarks = [Benchmark("b", Path("b"), samples, tuple(range(prompts)), {})]  # type: ignore[arg-type]
    sized = sizing.with_engine_sizes(config, B7, H100, sizing.eval_load(benchmarks), trainers=False)
    assert sized.inference.vllm["max_num_seqs"] == wanted


def test_what_the_user_sets_stays():
    own = {"max_num_seqs": 7, "max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.45, "block_size": 32}
    assert chosen(make(vllm=own)) == own


def test_a_colocated_engine_leaves_room_for_the_rank():
    config = make()
    share = chosen(config)["gpu_memory_utilization"]
    # 2 bytes of weight, 4 of gradient, 12 / 4 of optimizer state.
    assert sizing.rank_bytes(config, B7) == pytest.approx(9 * OF_RANK, rel=1e-5)
    left = H100 - 9 * OF_RANK - 4 * 2**30 - 4 * 152064 * 3584 * 2
    assert share == pytest.approx(left / 2 / H100, abs=0.01)
    assert share * H100 > 15.2e9 + 2 * 2**30
    assert chosen(config, 0)["gpu_memory_utilization"] == 0.4  # nobody knows the GPU


def test_a_rank_that_leaves_the_gpu_gives_its_room_to_the_engine():
    def offload(*classes: str, **more: Any) -> Config:
        return make(trainer={"world_size": 16, "tensor_parallel": 4, "offload": list(classes)} | more)

    everything = offload("gradients", "optimizer", "parameters")
    assert sizing.resident_bytes(make(), B7) == sizing.rank_bytes(make(), B7)
    assert sizing.resident_bytes(everything, B7) == 2 << 30  # trainer.offload_residue_mb
    assert sizing.resident_bytes(offload("gradients", offload_residue_mb=1024), B7) == pytest.approx(
        5 * OF_RANK + 2**30, rel=1e-5
    )
    assert sizing.arena_bytes(everything, B7) == pytest.approx(5 * OF_RANK, rel=1e-5)  # gradients are not kept
    assert sizing.arena_bytes(offload("gradients"), B7) == 0
    share = chosen(everything)["gpu_memory_utilization"]
    assert share == pytest.approx(0.95 * (H100 - 6 * 2**30) / H100, abs=0.01)
    assert share > 2 * chosen(make())["gpu_memory_utilization"]


def test_offload_makes_no_room_for_a_step_that_does_not_fit():
    config = make(trainer={"world_size": 1, "tensor_parallel": 1, "offload": ["optimizer"]}, inference={"engines": 1})
    with pytest.raises(UserError, match=r"offload = \['optimizer'\] makes too little room: .* 131.* 79.6; raise"):
        chosen(config)
    everything = {"offload": ["gradients", "optimizer", "parameters"], "offload_step_mb": 4096}
    config = make(trainer={"world_size": 1, "tensor_parallel": 1} | everything, inference={"engines": 1})
    assert chosen(config)["gpu_memory_utilization"] > 0.8  # 6 bytes a parameter and 4 GiB fit


@pytest.mark.parametrize(
    ("tables", "trainers"),
    [
        ({"inference": {"placement": "separate"}}, True),
        ({}, False),
    ],
)
def test_an_engine_with_a_gpu_of_its_own_keeps_vllms_share(tables, trainers):
    assert "gpu_memory_utilization" not in chosen(make(**tables), trainers=trainers)


def test_an_engine_with_a_cache_of_a_given_size_asks_for_room_beside_its_rank():
    """vLLM looks at its start whether so much is free, whatever the cache's size."""
    vllm = chosen(make(inference={"vllm": {"kv_cache_memory_bytes": 4 << 30}}))
    assert vllm["gpu_memory_utilization"] == chosen(make())["gpu_memory_utilization"]
    cache = SimpleNamespace(gpu_memory_utilization=0.92, kv_cache_memory_bytes=4 << 30)
    snapshot = SimpleNamespace(total_memory=H100, free_memory=H100 // 2, device_="cuda:0")
    request: Any = request_memory
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        request(snapshot, cache)
    cache.gpu_memory_utilization = vllm["gpu_memory_utilization"]
    assert request(snapshot, cache) < H100 // 2


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"vllm": {"gpu_memory_utilization": 0.9}}, "0.9 leaves a trainer rank no room"),
        ({"vllm": {"gpu_memory_utilization": 0.15}}, "0.15 leaves an engine no room"),
        ({"trainer": {"world_size": 16, "tensor_parallel": 1}, "gpu": 40 * 2**30}, r"0 leaves an engine no room"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_sizes(tables, said):
    gpu = tables.pop("gpu", H100)
    with pytest.raises(UserError, match=re.escape(f"gpu_memory_utilization = {said}")) as e:
        chosen(make(**tables), gpu)
    assert "an engine's weights take 14.2" in str(e.value)
    assert "inference.placement=separate" in str(e.value)


def test_experts_are_split_over_their_own_ranks(parameters):
    """Qwen3-30B-A3B on 16 ranks: 1.54 G parameters are on each, of 29 G in experts each has an eighth."""
    moe = ModelShape(
        family="qwen3_moe", layers=48, hidden=2048, ffn=6144, heads=32, kv_groups=4, head_dim=128, vocab=151936,
        tied=False, qkv_bias=False, qk_norm=True, norm_eps=1e-6, max_positions=40960, rope_theta=1e6, rope_scaling=None,
        experts=Experts(number=128, top_k=8, ffn=768, normalize=True),
    )  # fmt: skip
    parameters["n"] = weights.parameters(moe)
    of_experts = 48 * 128 * 3 * 2048 * 768
    dense = parameters["n"] - of_experts
    assert 30e9 < parameters["n"] < 31e9
    sizes = {"world_size": 16, "tensor_parallel": 1, "expert_parallel": 8}
    split = 6 * (dense + of_experts / 8)  # weights and gradients
    padded = {"rel": 1e-3}  # the vocabulary, buckets
    assert sizing.rank_bytes(make(trainer=sizes), moe) == pytest.approx(split + 12 * parameters["n"] / 16, **padded)
    whole = make(trainer=sizes | {"distributed_optimizer": False})
    assert sizing.rank_bytes(whole, moe) == pytest.approx(3 * split, **padded)
    tensor = make(trainer=sizes | {"world_size": 32, "tensor_parallel": 4, "sequence_parallel": True})
    replicated = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048  # routers and norms
    split = 6 * ((dense - replicated) / 4 + replicated + of_experts / 32)
    assert sizing.rank_bytes(tensor, moe) == pytest.approx(split + 12 * parameters["n"] / 32, **padded)


def test_a_stream_asks_engines_for_all_batches_that_are_outstanding():
    correction = {"correction": {"mode": "mask"}}
    plain = make(inference={"placement": "separate"})
    stream = make(
        inference={"placement": "separate"},
        algorithm=correction,
        sampling={"mode": "stream", "max_staleness": 3},
    )
    assert sizing.rollout_load(stream).sequences == 4 * sizing.rollout_load(plain).sequences
