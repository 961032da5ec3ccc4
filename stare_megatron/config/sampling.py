"""Settings of when batches are sampled: `[sampling]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stare_megatron.config.base import Section


class SamplingConfig(Section):
    mode: Literal["sync", "one_step"] = Field(
        default="sync",
        description="`sync`: a batch is sampled while the trainer waits, by the newest policy; `one_step`: while the "
        "trainer learns from the batch before, by the policy before; see docs/sampling.md.",
    )

    @property
    def ahead(self) -> bool:
        """Whether engines sample while the trainer works, hence by weights that it has changed since."""
        return self.mode != "sync"

    def fault(self, placement: str, correction: str, scoring: str) -> str:
        """Why the mode cannot be, or would be wrong, with `inference.placement`, `algorithm.correction.mode` and
        `trainer.scoring`; with the cure. "" where it is right."""
        if not self.ahead:
            return ""
        key = f'sampling.mode = "{self.mode}"'
        if placement != "separate":
            return (
                f"{key} samples while the trainer works, so engines need devices of their own; set "
                'inference.placement = "separate", or sampling.mode = "sync"'
            )
        if scoring == "rollout":
            return (
                f"{key} trains on samples of an older policy, whose log-probs are not those of the policy about to be "
                'updated; set trainer.scoring = "trainer"'
            )
        if correction == "none":
            return (
                f'{key} trains on samples of an older policy, and algorithm.correction.mode = "none" learns from them '
                'as if they were new; set algorithm.correction.mode = "truncate" or "mask" (docs/rollout_correction.md)'
            )
        return ""
