"""One file per method: a loss takes `LossInputs` and returns per-token values, unreduced."""
