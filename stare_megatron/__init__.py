"""STARE at Megatron scale: reinforcement learning of large language models (arXiv 2606.19236)."""

__version__ = "0.1.0"
