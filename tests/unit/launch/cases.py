"""A run to launch, and the command line's job of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from stare_megatron.__main__ import _parser
from stare_megatron.launch import job
from stare_megatron.launch.job import Job

RUN = """
[run]
name = "Launched_1"
dir = "{folder}/runs"
steps = 4
[model]
path = "{folder}/models/m"
[data]
train = ["{folder}/data/train.jsonl"]
[reward]
name = "math"
[trainer]
world_size = 16
tensor_parallel = 4
[inference]
engines = 16
"""
TOOL = ["env.name=tool_use", "env.parser=retool", "sandbox.actors=4", "sandbox.actor_cpus=16"]
MARKED = [*TOOL, "sandbox.node_resource=sandbox"]


def write(folder: Path) -> Path:
    file = folder / "run.toml"
    file.write_text(RUN.format(folder=folder))
    return file


def arguments(folder: Path, target: str, *words: str) -> argparse.Namespace:
    return _parser().parse_args(["launch", target, str(write(folder)), *words])


def job_of(folder: Path, target: str, *words: str) -> Job:
    return job.of(arguments(folder, target, *words), [])
