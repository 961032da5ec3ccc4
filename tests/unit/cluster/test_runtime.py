"""Errors of Ray as the user meets them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
import ray.exceptions

from stare_megatron.cluster import runtime
from stare_megatron.errors import RunError


def test_a_process_ended_for_want_of_memory_is_one_line(monkeypatch):
    said = (
        "1 worker(s) were killed due to the node running low on memory. It was 23.1GB used / 23.5GB limit\nOOM kill\n"
    )

    def get(ref: Any) -> Any:
        raise ray.exceptions.OutOfMemoryError(said)

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    with pytest.raises(RunError) as e:
        runtime.get(reference, "trainer 1")
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("trainer 1: Ray ended its process: 1 worker(s) were killed due to the node")
    assert "23.1GB used / 23.5GB limit; run less beside it" in str(e.value)


def test_a_node_that_does_not_answer_is_not_said_to_be_dead(monkeypatch):
    def get(ref: Any) -> Any:
        raise ray.exceptions.ActorUnavailableError("RpcError: keepalive watchdog timeout rpc_code: 14", None)

    monkeypatch.setattr(ray, "get", get)
    reference: Any = object()
    with pytest.raises(RunError, match=r"^trainer rank 1: its node does not answer") as e:
        runtime.get(reference, "trainer rank 1")
    assert "died" not in str(e.value)
    assert "keepalive watchdog timeout" in str(e.value)
    assert "the process may still run" in str(e.value)


def test_gloo_uses_the_interface_of_the_nodes_address(monkeypatch):
    """Whatever the host's name resolves to."""
    monkeypatch.setattr(runtime, "node_address", lambda: "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    runtime.use_network_of_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    runtime.use_network_of_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(runtime, "node_address", lambda: "203.0.113.9")
    runtime.use_network_of_node()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
