"""What callers of an engine hear when vLLM's core is gone. The core itself is stood in for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.inference.engine import Engine
from stare_megatron.inference.output import Output


def heard(*, closed: bool) -> RunError:
    async def dead() -> None:
        raise EngineDeadError

    made: Any = Engine.__new__(Engine)
    made.name, made._llm, made._output = "engine 0", None if closed else object(), Output()
    with pytest.raises(RunError) as e:
        asyncio.run(made._call(dead()))
    return e.value


def test_a_dead_core_is_an_engine_that_is_lost() -> None:
    error = heard(closed=False)
    assert isinstance(error, EngineLostError)
    assert str(error).startswith("engine 0: its vLLM process died")


def test_an_engine_that_was_closed_is_not_lost() -> None:
    error = heard(closed=True)
    assert not isinstance(error, EngineLostError)
    assert str(error) == "engine 0: it was closed"
