"""Checkpoints between Hugging Face's files and Megatron-Core's, tensor by tensor; what is in one; how two differ."""
