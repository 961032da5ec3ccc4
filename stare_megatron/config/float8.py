"""Float8 in the engines or in the trainer: what a run needs when the two multiply differently."""

from __future__ import annotations

from typing import Literal

Recipe = Literal["none", "tensorwise", "blockwise", "mxfp8"]

FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Megatron-Core's `fp8` by its `fp8_recipe`: hybrid has gradients in e5m2, which reaches further and is coarser; with
scales of small blocks e4m3 reaches far enough."""

BLOCKS = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Rows and columns of what is multiplied come in multiples of this (Transformer Engine, `assert_dim_for_fp8_exec` and
the quantizers' `is_quantizable`)."""


def type_fault(key: str, dtype: str, dtypes: tuple[str, ...]) -> str:
    """Why `key` may not be used with `model.dtype`, of which it takes `dtypes`, with the cure; "" where it may."""
    wanted = " or ".join(f'"{name}"' for name in dtypes)
    return "" if dtype in dtypes else f"{key} is of 16-bit weights; set model.dtype = {wanted}"


def fault(key: str, correction: str, scoring: str, probe_every: int, threshold: float) -> str:
    """Why `key` may not be used with `algorithm.correction.mode`, `trainer.scoring`, `sync.probe_every` and
    `sync.probe_threshold`, with the cure; "" where it may."""
    if scoring == "rollout":
        return (
            f"{key}: the engines' log-probs are not those of the policy about to be updated; set trainer.scoring = "
            '"trainer"'
        )
    if correction == "none":
        return (
            f"{key}: the policy that samples differs from the trained one, and algorithm.correction.mode = "
            '"none" learns as if it did not; set algorithm.correction.mode = "truncate" or "mask" '
            "(docs/rollout_correction.md)"
        )
    if not (probe_every and threshold):
        return (
            f"{key} needs a bound on how far engine and trainer may be apart, which checksums of weights cannot tell; "
            "set sync.probe_threshold, for instance to 0.2 nats, and sync.probe_every of at least 1 "
            "(docs/quantization.md)"
        )
    return ""
