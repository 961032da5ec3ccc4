"""What can be known to be wrong with a supervised run before anything is started: no torch, no Ray."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.config import SftConfig, beside
from stare_megatron.errors import UserError
from stare_megatron.metrics import prometheus
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.run import preflight
from stare_megatron.run.machine import check_machine


def check(config: SftConfig) -> tuple[str, ...]:
    """Check a configuration against packages, files and this machine. Changes nothing. Returns notes.

    Raises:
        UserError: the first thing found wrong, with its cure.
    """
    preflight.check_packages()
    check_files(config)
    shape = read_hf_config(config.model.path)
    preflight.check_weights(config.model.path, shape)
    preflight.check_initial(config.model.weights)
    ranks = config.for_ranks()
    preflight.check_trainer_options(ranks, shape)  # first: a layout depends on them
    preflight.check_layout(ranks, shape)
    check_window(config, shape)
    preflight.check_cluster(ranks)
    if config.logging.prometheus_port:
        prometheus.listen(config.logging).close()
    return (*beside.shadows(Path.cwd()), *check_machine(ranks, shape))


def check_files(config: SftConfig) -> None:
    """Raises: UserError: a file of conversations that is not there."""
    preflight.check_files("data.train", config.data.train)
    preflight.check_files("data.eval", config.data.eval)


def check_window(config: SftConfig, shape: ModelShape) -> None:
    """Raises: UserError: sequences longer than the model's positions."""
    if config.sft.max_tokens > shape.max_positions:
        raise UserError(
            f"sft.max_tokens = {config.sft.max_tokens}; {config.model.path / 'config.json'} allows {shape.longest}: "
            "lower it"
        )
