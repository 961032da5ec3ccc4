"""What a checkpoint of a model family looks like. Imports no megatron: a driver can check one with it."""
