"""What draws tokens: an engine, or anything that looks like one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stare_megatron.types import Completion, Sampling


class SampleError(Exception):
    """The sampler failed this one request and can serve others: the trajectory becomes FAILED."""


class Sampler(Protocol):
    """Token ids in, token ids and log-probs out."""

    @property
    def version(self) -> int:
        """The policy version requests are drawn from now."""
        ...

    async def sample(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Continue `token_ids`.

        Raises:
            SampleError: this request failed. Any other exception ends the run.
        """
        ...
