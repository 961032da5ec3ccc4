"""What the trainer knew of a trajectory's tokens when it learned from them, kept for reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """One trajectory's tokens at its optimizer step, [n] each, in the order of the stream.

    `known` bool: an action token that the rank (or, after `join`, the step) trained on; all else is 0 where it is
    False. Float32: `logprob`, natural log, and `entropy`, nats, at the rollout temperature; `raw_logprob` at
    temperature 1, as the engines' log-probs are; `advantage`; `weight`, factor of the token's loss. `selected` bool: in
    L+ where the advantage is above 0, in L- where it is below.

    Example (a prompt token and two action tokens, the second in L-):
        TokenRecord(known=[F, T, T], logprob=[0, -0.1, -2.3], raw_logprob=[0, -0.1, -2.3], entropy=[0, 0.4, 1.1],
                    advantage=[0, -1, -1], weight=[0, 1, 0.9], selected=[F, F, T])
    """

    known: npt.NDArray[np.bool_]
    logprob: npt.NDArray[np.float32]
    raw_logprob: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    advantage: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    selected: npt.NDArray[np.bool_]

    @property
    def selection(self) -> npt.NDArray[np.int8]:
        """1 in L+, -1 in L-, else 0; int8 [n]."""
        return np.where(self.selected, np.sign(self.advantage), 0).astype(np.int8)


def join(parts: Sequence[TokenRecord]) -> TokenRecord:
    """One record of the parts that context-parallel ranks have of a trajectory: each token is known to one of them.

    Raises:
        ValueError: no part, or a token that two parts know.
    """
    if not parts:
        raise ValueError("no part of a token record")
    if (np.sum([part.known for part in parts], axis=0) > 1).any():
        raise ValueError("two parts of a token record know the same token")

    def total(name: str) -> npt.NDArray[np.float32]:
        return np.asarray(sum(np.where(part.known, part.__dict__[name], 0) for part in parts), np.float32)

    return TokenRecord(
        known=np.any([part.known for part in parts], axis=0),
        logprob=total("logprob"),
        raw_logprob=total("raw_logprob"),
        entropy=total("entropy"),
        advantage=total("advantage"),
        weight=total("weight"),
        selected=np.any([part.known & part.selected for part in parts], axis=0),
    )
