"""The configuration of a run: one file a table, `config.py` the whole, `loader.py` reads it."""

from stare_megatron.config.algorithm import AlgorithmConfig
from stare_megatron.config.base import Free, Section, flatten, section_of
from stare_megatron.config.checkpoint import CheckpointConfig
from stare_megatron.config.cluster import ClusterConfig
from stare_megatron.config.config import Config
from stare_megatron.config.data import DataConfig
from stare_megatron.config.env import EnvConfig
from stare_megatron.config.eval import BenchmarkConfig, EvalConfig
from stare_megatron.config.inference import InferenceConfig
from stare_megatron.config.loader import all_keys, cluster_alone, load, load_run, load_sft, parse, parse_sft, wanted
from stare_megatron.config.logging import LoggingConfig
from stare_megatron.config.methods import CorrectionConfig, Selector, StareConfig
from stare_megatron.config.model import ModelConfig
from stare_megatron.config.reward import RewardConfig
from stare_megatron.config.rollout import RolloutConfig
from stare_megatron.config.run import RunConfig
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.config.sft import SftConfig, SftDataConfig
from stare_megatron.config.sync import SyncConfig
from stare_megatron.config.trainer import OptimizerConfig, TrainerConfig

__all__ = [
    "AlgorithmConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CorrectionConfig",
    "DataConfig",
    "EnvConfig",
    "EvalConfig",
    "Free",
    "InferenceConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SandboxConfig",
    "Section",
    "Selector",
    "SftConfig",
    "SftDataConfig",
    "StareConfig",
    "SyncConfig",
    "TrainerConfig",
    "all_keys",
    "cluster_alone",
    "flatten",
    "load",
    "load_run",
    "load_sft",
    "parse",
    "parse_sft",
    "section_of",
    "wanted",
]
