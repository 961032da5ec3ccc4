"""Supervised training on the trainer's ranks, without engines: `stare-megatron sft`."""
