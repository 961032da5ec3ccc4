"""Errors of Ray as the user meets them."""

from __future__ import annotations

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
