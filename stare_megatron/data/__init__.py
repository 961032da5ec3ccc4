"""Prompts from files, tokenised and shuffled resumably; packing of trajectories into batches."""
