"""Environments by name: what a policy talks to during one episode."""

from __future__ import annotations

from stare_megatron.config.registry import Registry
from stare_megatron.envs import single_turn, tool_use
from stare_megatron.envs.base import End, Env, EnvContext, EnvError, EnvKind

__all__ = ["ENVS", "End", "Env", "EnvContext", "EnvError", "EnvKind"]

ENVS = Registry("env.name", EnvKind, {"single_turn": single_turn.ENV, "tool_use": tool_use.ENV})
