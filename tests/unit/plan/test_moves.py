"""What a step moves between a GPU and its host, and what the host keeps."""

from __future__ import annotations

from typing import Any

import pytest

from stare_megatron.config import Config
from stare_megatron.models.layout import GPU_PUSH_BUCKET, push_buffers
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.hardware import CONSTANTS, GPUS
from stare_megatron.plan.moves import host_memory, moves
from stare_megatron.plan.parameters import fullest
from stare_megatron.plan.timing import Machine, push_time
from stare_megatron.run import sizing
from tests.configs import configuration
from tests.unit.run.test_sizing import B7

MACHINE = Machine(GPUS["h100"], CONSTANTS, Layers.ENGINE)
RATE = 64e9 * 0.4
ALL = ["gradients", "optimizer", "parameters"]


def make(trainer: dict[str, Any] | None = None, **tables: dict[str, Any]) -> Config:
    return configuration(
        trainer={"world_size": 16, "tensor_parallel": 4, "updates_per_batch": 2} | (trainer or {}),
        **({"inference": {"engines": 16}} | tables),
    )


def test_nothing_moves_without_offload() -> None:
    assert moves(make(), B7, MACHINE).seconds == 0
    assert host_memory(make(checkpoint={"asynchronous": False}), B7, MACHINE).saving == 0


def test_parameters_come_and_go_once_a_step_and_optimizer_states_for_each_of_the_optimizers() -> None:
    held = fullest(B7, make().trainer, "bfloat16")
    shared = moves(make({"offload": ALL}), B7, MACHINE)
    assert shared.rollout == shared.push == pytest.approx(held.parameters / RATE)
    assert shared.update == pytest.approx(2 * 2 * held.optimizer / RATE)  # both ways, for each of two steps
    assert shared.bytes == pytest.approx(2 * held.parameters + 4 * held.optimizer)
    assert shared.seconds == pytest.approx(shared.bytes / RATE)
    assert moves(make({"offload": ["gradients"]}), B7, MACHINE).bytes == 0


def test_a_nodes_arenas_are_those_that_its_ranks_make() -> None:
    config = make({"offload": ALL})
    host = host_memory(config, B7, MACHINE)
    assert host.arenas == 8 * sizing.arena_bytes(config, B7)
    assert host.saving == pytest.approx(8 * 14 * 7_615_616_512 / 16)
    assert host_memory(make({"offload": ["optimizer"], "world_size": 4}), B7, MACHINE).ranks == 4


def test_a_sharded_push_needs_two_buckets_and_no_time_for_gathering() -> None:
    assert push_buffers(B7, "bfloat16", "sharded") == 2 * GPU_PUSH_BUCKET < push_buffers(B7, "bfloat16", "auto") / 20
    for placement in ("colocated", "separate"):
        table = {"engines": 16, "placement": placement}
        whole, shards = (
            push_time(make(inference=table, sync={"method": method}), B7, MACHINE) for method in ("whole", "sharded")
        )
        assert whole.bytes == shards.bytes == 2 * 7_615_616_512
    near = push_time(make(inference={"engines": 16}, sync={"method": "sharded"}), B7, MACHINE)
    assert near.seconds < shards.seconds / 2  # within nodes, three quarters of it
    alone = {"world_size": 1, "tensor_parallel": 1}
    one = push_time(make(alone, inference={"engines": 1}, sync={"method": "sharded"}), B7, MACHINE)
    words = 0.5e-3 * one.bytes / GPU_PUSH_BUCKET
    assert one.seconds == pytest.approx(4 * one.bytes / (3.35e12 * 0.9) + words)  # nothing over a link
