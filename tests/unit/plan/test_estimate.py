"""What a plan says of phases, and its properties."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from stare_megatron.config import TrainerConfig
from stare_megatron.data.packing import num_micro_batches
from stare_megatron.models.shape import Experts
from stare_megatron.plan import lengths
from stare_megatron.plan.activations import Layers, Pack, in_flight, update_peak
from stare_megatron.plan.estimate import make
from stare_megatron.plan.memory import Phase
from stare_megatron.plan.parameters import Layout, held, largest
from stare_megatron.plan.sampling import Engine, decode
from stare_megatron.plan.timing import Ranks
from tests.properties import bounded
from tests.unit.plan.models import ENGINES, ROLLOUT, TRAINER, config_of, given_for, plan_of, shape_of


def test_quantized_engines_take_a_byte_of_a_matrix() -> None:
    """By hand: Qwen2.5-7B's layers, whose matrices have a float32 scale for each output."""
    quantized = {
        "inference": ENGINES | {"tensor_parallel": 1, "quantization": "fp8_per_channel"},
        "algorithm": {"correction": {"mode": "truncate"}},
        "sync": {"probe_threshold": 0.2},
    }
    trainer = {"tensor_parallel": 4, "offload": ["gradients", "optimizer", "parameters"]}
    plain = plan_of("qwen2.5-7b", trainer=trainer, inference=ENGINES | {"tensor_parallel": 1})
    small = plan_of("qwen2.5-7b", trainer=trainer, **quantized)
    hidden, ffn, keys = 3584, 18944, 512
    matrices = hidden * (2 * hidden + 2 * keys + 3 * ffn)
    scales = (hidden + 2 * keys) + hidden + 2 * ffn + hidden
    assert plain.room.weights - small.room.weights == 28 * (matrices - 4 * scales)
    assert small.room.kv > plain.room.kv
    assert small.rollout.seconds < plain.rollout.seconds
    assert small.push == plain.push  # what is sent is not quantized


def test_a_larger_gpu_has_room_for_more() -> None:
    share = {"vllm": {"gpu_memory_utilization": 0.45}}
    small, large = (plan_of(gpu=gpu, inference=share) for gpu in ("h100", "h200"))
    assert large.room.at_mean > small.room.at_mean
    assert large.rollout.seconds < small.rollout.seconds
    assert large.update.seconds < small.update.seconds


def test_separate_engines_have_their_own_table() -> None:
    plan = plan_of(inference={"placement": "separate"})
    assert {(u.role, u.phase) for u in plan.uses} >= {("engine", Phase.ROLLOUT), ("rank", Phase.UPDATE)}
    assert plan.gpus == 64
    assert not plan.violations


def test_who_samples_while_the_ranks_work_takes_the_longer_of_the_two() -> None:
    separate, corrected = {"placement": "separate"}, {"correction": {"mode": "truncate"}}
    plain = plan_of(inference=separate)
    ahead = plan_of(inference=separate, algorithm=corrected, sampling={"mode": "one_step"})
    shorter = min(plain.rollout.seconds, plain.score.seconds + plain.update.seconds)
    assert ahead.seconds == pytest.approx(plain.seconds - shorter)


def test_pipelines_keep_what_their_schedule_keeps() -> None:
    layout = Layout.of(TrainerConfig(world_size=4, pipeline_parallel=4))
    assert [in_flight(layout, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(layout, 0, 2) == 2
    interleaved = dataclasses.replace(layout, virtual=2)
    assert [in_flight(interleaved, stage, 16) for stage in range(4)] == [11 / 2, 9 / 2, 7 / 2, 5 / 2]


def test_bubbles() -> None:
    plan = plan_of(trainer={"tensor_parallel": 4, "pipeline_parallel": 4})
    count = plan.update.micro_batches
    assert plan.update.bubble_share == pytest.approx(3 / (count + 3), rel=0.1)
    assert plan_of().update.bubble == 0


def test_scoring_from_the_rollout_costs_nothing() -> None:
    plan = plan_of(trainer={"scoring": "rollout"})
    assert plan.score.seconds == 0
    assert plan.mfu == pytest.approx(plan.update.mfu)


def test_decoding_by_hand() -> None:
    """Two sequences of 10 and 30 tokens, one at a time or both."""
    plan = plan_of(inference={"vllm": {"gpu_memory_utilization": 0.45}})
    engine = Engine(plan.config, plan.shape, plan.given.machine, plan.room, 2)
    one, two = (sum(_step(engine, n, 0)) for n in (1, 2))
    both, tail, _ = decode(engine, [10, 30], 0.0)
    assert both == pytest.approx(10 * two + 20 * one, rel=1e-3)
    assert tail == 0
    alone, _, _ = decode(dataclasses.replace(engine, running=1), [10, 30], 0.0)
    assert alone == pytest.approx(40 * one, rel=1e-3)


def _step(engine: Engine, count: int, context: float) -> tuple[float, float]:
    memory, products, beside = engine.step(count, context)
    return max(memory, products), beside


@examples(st.lists(st.integers(1, 9000), min_size=1, max_size=80), st.integers(100, 9000))
@bounded(60)
def test_micro_batches_are_counted_as_they_are_packed(sequences: list[int], budget: int) -> None:
    packed = lengths.micro_batches(sequences, budget)
    assert len(packed) == num_micro_batches(sequences, budget)
    assert sum(packed) == sum(sequences)


@examples(st.floats(0.05, 1.0), st.integers(8, 700), st.integers(64, 40_000))
@bounded(60)
def test_assumed_lengths_have_their_mean(share: float, count: int, longest: int) -> None:
    found = lengths.log_normal(count, share * longest, longest, 0.7)
    assert max(found) <= longest
    assert sum(found) / count == pytest.approx(share * longest, rel=0.02, abs=1)


LAYOUTS = st.tuples(
    st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2)), st.integers(1, 5)
)


@examples(st.sampled_from(("qwen2.5-7b", "qwen3-32b", "qwen3-30b-a3b")), LAYOUTS, st.integers(2, 4))
@bounded(60)
def test_more_ranks_hold_no_more(name: str, sizes: tuple[int, int, int, int], factor: int) -> None:
    tensor, pipeline, context, data = sizes
    shape = shape_of(name)
    tensor = min(tensor, shape.kv_groups)
    world = tensor * pipeline * context * data
    one, more = (
        Layout.of(TrainerConfig(
            world_size=w, tensor_parallel=tensor, pipeline_parallel=pipeline, context_parallel=context
        ))
        for w in (world, factor * world)
    )  # fmt: skip
    before, after = (largest(shape, layout, 0).state("bfloat16", sharded=True) for layout in (one, more))
    padding = 6 * 128 * factor * world  # bytes, of one buffer
    assert after.total <= before.total + padding
    assert after.optimizer < before.optimizer
    # Every element is owned once.
    owners = [held(shape, one, rank) for rank in range(0, world // pipeline, tensor)]
    assert sum(h.owned for h in owners) == owners[0].parameters


@examples(
    st.sampled_from(("qwen2.5-7b", "qwen3-30b-a3b")),
    st.integers(1024, 32768),
    st.integers(1, 8),
    st.sampled_from(list(Layers)),
)
@bounded(60)
def test_recomputation_keeps_less_and_longer_packs_more(name: str, tokens: int, more: int, layers: Layers) -> None:
    shape = shape_of(name)

    def at(recompute: str, size: int) -> float:
        t = TrainerConfig(recompute=recompute, tensor_parallel=4, sequence_parallel=True, world_size=4)  # type: ignore[arg-type]
        pack = Pack(size, size * 0.9)
        return update_peak(shape, Layout.of(t), t, layers, "bfloat16", 0, pack, 4).kept

    assert at("full", tokens) < at("selective", tokens) < at("none", tokens)
    assert at("none", tokens) < at("none", tokens + more)


def test_a_shared_expert_that_is_computed_again_is_not_kept() -> None:
    """Qwen2-MoE's by hand, of Transformer Engine's layers in bfloat16: gate, up and their product, its output and the
    gate's value."""
    shape = dataclasses.replace(
        shape_of("qwen2.5-7b"), family="qwen2_moe",
        experts=Experts(number=8, top_k=2, ffn=1024, normalize=True, shared_ffn=4096),
    )  # fmt: skip

    def at(**recompute: Any) -> float:
        t = TrainerConfig(**recompute)
        return update_peak(shape, Layout.of(t), t, Layers.ENGINE, "bfloat16", 0, Pack(1, 1), 4).kept

    every, again = at(), at(recompute="selective", recompute_modules=["shared_experts"])
    assert every - again == 28 * 2 * (3 * 4096 + 3584 + 2)
    assert again > at(recompute="selective", recompute_modules=["moe"])


@examples(st.integers(512, 16384), st.floats(1.05, 4.0), st.sampled_from(("flops", "bandwidth", "nvlink", "network")))
@bounded(40)
def test_a_faster_gpu_is_no_slower(response: int, faster: float, what: str) -> None:
    config = config_of(
        "qwen3-32b", rollout=ROLLOUT | {"max_response_tokens": response}, trainer=TRAINER, inference=ENGINES
    )
    given = given_for(config)
    m = given.machine
    quick = dataclasses.replace(m, gpu=dataclasses.replace(m.gpu, **{what: getattr(m.gpu, what) * faster}))
    shape = shape_of("qwen3-32b")
    before, after = (make(config, shape, dataclasses.replace(given, machine=x), cures=False) for x in (m, quick))
    for phase in ("rollout", "score", "update", "push"):
        assert getattr(after, phase).seconds <= getattr(before, phase).seconds
    assert 0 < before.mfu < 1


@examples(st.integers(600, 12_000), st.floats(1.1, 2.0))
@bounded(40)
def test_longer_responses_take_longer(response: int, factor: float) -> None:
    found = []
    for longest in (response, int(response * factor)):
        rollout = ROLLOUT | {"max_response_tokens": longest}
        config = config_of("qwen2.5-7b", rollout=rollout, trainer=TRAINER | {"tensor_parallel": 4}, inference=ENGINES)
        found.append(make(config, shape_of("qwen2.5-7b"), given_for(config), cures=False))
    short, long = found
    assert long.rollout.seconds > short.rollout.seconds
    assert long.score.seconds > short.score.seconds
    assert long.room.at_mean <= short.room.at_mean


def test_a_huge_batch_is_planned_in_a_moment() -> None:
    """By samples that stand for all: as long as so many smaller ones."""
    one, many = (plan_of("qwen2.5-7b", rollout={"prompts_per_step": n}) for n in (2**12, 2**20))
    assert many.score.seconds == pytest.approx(256 * one.score.seconds, rel=0.02)
    assert many.rollout.seconds == pytest.approx(256 * one.rollout.seconds, rel=0.1)
    assert many.rollout.tokens == pytest.approx(256 * one.rollout.tokens, rel=0.01)


def test_larger_micro_batches_launch_less() -> None:
    few, many = (plan_of(trainer={"micro_batch_tokens": n}) for n in (32768, 16384))
    assert few.update.parts.launches < many.update.parts.launches
    assert Ranks(few.config, few.shape, few.given.machine, few.given.lengths).batches() != []
