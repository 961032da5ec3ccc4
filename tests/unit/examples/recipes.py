"""The examples for GPUs: their files, the shapes of their models, and the GPUs that they are meant for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stare_megatron import config
from stare_megatron.config import Config
from tests.contracts.source import ROOT

MODELS = ROOT / "tests/data/models"


@dataclass(frozen=True)
class Recipe:
    """`model`: a folder of tests/data/models with the shape of the one that the file names."""

    file: str
    model: str
    gpus: int

    @property
    def path(self) -> Path:
        return ROOT / "examples" / self.file

    def load(self, *overrides: str) -> Config:
        return config.load(self.path, [f"model.path={MODELS / self.model}", *overrides])

    def __str__(self) -> str:
        return self.file.removesuffix(".toml")


RECIPES = [
    Recipe("short_cot_7b/run.toml", "qwen2.5-math-7b", 16),
    Recipe("short_cot_14b/run.toml", "qwen2.5-14b", 16),
    Recipe("short_cot_32b/run.toml", "qwen2.5-32b", 32),
    Recipe("long_cot_1.5b/run.toml", "r1-distill-qwen-1.5b", 8),
    Recipe("long_cot_1.5b/16k.toml", "r1-distill-qwen-1.5b", 8),
    Recipe("long_cot_1.5b/24k.toml", "r1-distill-qwen-1.5b", 8),
    Recipe("long_cot_8b/run.toml", "qwen3-8b-base", 16),
    Recipe("long_cot_8b/32k.toml", "qwen3-8b-base", 16),
    Recipe("long_cot_32b/run.toml", "qwen3-32b", 64),
    Recipe("moe_30b_a3b/run.toml", "qwen3-30b-a3b", 32),
    Recipe("tool_use_7b/run.toml", "qwen2.5-7b", 16),
    Recipe("single_node_7b/run.toml", "qwen2.5-math-7b", 8),
    Recipe("single_gpu_gsm8k/run.toml", "qwen2.5-0.5b", 1),
    Recipe("single_gpu_gsm8k/1.5b.toml", "qwen2.5-1.5b", 1),
]
