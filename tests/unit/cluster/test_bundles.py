"""What a run reserves, and the nodes that hold it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stare_megatron.cluster.bundles import nodes_needed, reserved, sandbox
from stare_megatron.errors import UserError
from tests.configs import configuration

NODE = {"GPU": 8.0}


def count(trainer: dict[str, Any], inference: dict[str, Any], node: dict[str, float] = NODE) -> int:
    return nodes_needed(reserved(configuration(trainer=trainer, inference=inference), gpus="GPU" in node), node)


@pytest.mark.parametrize(
    ("ranks", "inference", "nodes"),
    [
        (1, {"engines": 1}, 1),
        (8, {"engines": 8}, 1),
        (16, {"engines": 4, "tensor_parallel": 4}, 2),
        (8, {"engines": 8, "placement": "separate"}, 2),
        (4, {"engines": 4, "placement": "separate"}, 1),
        # Three engines of four GPUs do not fit the twelve GPUs left of two nodes by sixes.
        (4, {"engines": 3, "tensor_parallel": 4, "placement": "separate"}, 2),
        (10, {"engines": 3, "tensor_parallel": 4, "placement": "separate"}, 3),
    ],
)
def test_nodes_of_eight_gpus(ranks: int, inference: dict[str, Any], nodes: int) -> None:
    assert count({"world_size": ranks}, inference) == nodes


def test_on_cpus_every_actor_takes_one() -> None:
    assert count({"world_size": 4}, {"engines": 2}, {"CPU": 4.0}) == 2
    assert count({"world_size": 4}, {"engines": 2}, {"CPU": math.inf}) == 1


def test_an_engine_larger_than_a_node_is_refused() -> None:
    with pytest.raises(UserError, match="8 GPUs must be on one node, which has 4 GPUs; lower"):
        count({"world_size": 8}, {"engines": 1, "tensor_parallel": 8, "placement": "separate"}, {"GPU": 4.0})


def test_a_sandbox_of_its_own_takes_cpus_where_code_is_run() -> None:
    table = {"actors": 3, "actor_cpus": 4}
    marked = table | {"node_resource": "code"}
    tool = {"name": "tool_use", "parser": "retool"}
    assert sandbox(configuration(sandbox=table, env=tool)) == [{"CPU": 4.0}] * 3
    assert (
        sandbox(configuration(sandbox=marked, env=tool, cluster={"address": "auto"}))
        == [{"CPU": 4.0, "code": 1e-3}] * 3
    )
    assert sandbox(configuration(sandbox=table | {"actor_cpus": 0}, env=tool)) == [{}] * 3
    assert sandbox(configuration(sandbox=table)) == []
    assert sandbox(configuration(sandbox=table | {"url": "http://there"}, env=tool)) == []
