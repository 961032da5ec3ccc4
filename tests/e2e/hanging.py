"""GRPO with a rank that does not go on: in its second update it sleeps, or stops its own process. Once a run, where
`mark` says so."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Literal

import torch.distributed
from pydantic import Field

from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.losses.stare import stare_loss
from stare_megatron.algo.stare import Candidates, Weights, weigh_equally
from stare_megatron.config import AlgorithmConfig, Section
from stare_megatron.config.methods import Method, uses
from stare_megatron.types import Control

UPDATES = itertools.count(1)


class Settings(Section):
    rank: int = Field(default=1, ge=0, description="Who does it.")
    how: Literal["sleep", "stop"] = Field(default="sleep", description="What it does.")
    mark: str = Field(default="", description="A file that says that it was done; not made where empty.")


def oversleep() -> None:
    time.sleep(3600)


def weigh(tokens: Candidates, control: Control, config: AlgorithmConfig, comm: Comm) -> Weights:
    assert isinstance(config.settings, Settings)
    mark = Path(config.settings.mark)
    if next(UPDATES) == 2 and torch.distributed.get_rank() == config.settings.rank and not mark.is_file():
        if config.settings.mark:
            mark.touch()
        if config.settings.how == "sleep":
            oversleep()
        os.kill(os.getpid(), signal.SIGSTOP)
    return weigh_equally(tokens, comm)


HANGING = Method(
    uses("normalize_std reduction clip_low clip_high dual_clip"),
    settings=Settings,
    algorithm=Algorithm(stare_loss, weigh=weigh),
)
