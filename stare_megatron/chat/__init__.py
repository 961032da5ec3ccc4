"""A trained policy answers in a terminal: `stare-megatron sample`."""
