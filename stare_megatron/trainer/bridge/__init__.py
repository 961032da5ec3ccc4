"""Hugging Face checkpoints <-> Megatron-Core shards. `families` and `shape` import neither torch nor megatron."""
