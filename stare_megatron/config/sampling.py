"""Settings of when batches are sampled: `[sampling]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stare_megatron.config.base import Free, Section


class SamplingConfig(Section):
    mode: Literal["sync", "one_step", "stream"] = Field(
        default="sync",
        description="`sync`: a batch is sampled while the trainer waits, by the newest policy; `one_step`: while the "
        "trainer learns from the batch before, by the policy before; `stream`: groups are sampled all the time, and "
        "weights change under them; see docs/sampling.md.",
    )
    max_staleness: int = Field(
        default=2,
        ge=0,
        le=64,
        description="`stream`: updates between the policy that a group was begun with and the one that learns from it, "
        "at most; so many batches and one more are outstanding, or fewer by `over_sampling`. 0: as `sync`.",
    )
    over_sampling: float = Field(
        default=0,
        ge=0,
        le=64,
        description="`stream`: batches that are sampled beyond the one that the trainer takes next, in parts of one "
        "too; at most `max_staleness`. 0: as many as that.",
    )
    window: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="`stream`: how far from the oldest outstanding group one may be taken out of turn, as a share of "
        "all outstanding.",
    )
    kv: Literal["recompute", "keep"] = Field(
        default="recompute",
        description="`stream`: the KV cache of requests in flight when weights change: computed again by the new "
        "weights, or kept as the old ones made it.",
    )

    bank: Free[bool] = Field(
        default=True,
        description="`stream`: keep what is sampled and not learned from for a resumed run, at every checkpoint: "
        "finished groups in the run's folder, and what there is of others; else it samples them again.",
    )

    @property
    def ahead(self) -> bool:
        """Whether engines sample while the trainer works, hence by weights that it has changed since."""
        return self.oldest > 0

    @property
    def oldest(self) -> int:
        """How many updates a trained token's policy may be behind."""
        return {"sync": 0, "one_step": 1, "stream": self.max_staleness}[self.mode]

    def outstanding(self, batch: int) -> int:
        """`stream`: groups that are admitted and not learned from, at most, where an update learns from `batch`."""
        return batch + round((self.over_sampling or self.max_staleness) * batch)

    @model_validator(mode="after")
    def _idle(self) -> SamplingConfig:
        own = {
            "max_staleness": self.max_staleness,
            "over_sampling": self.over_sampling,
            "window": self.window,
            "kv": self.kv,
            "bank": self.bank,
        }
        changed = [key for key, value in own.items() if value != type(self).model_fields[key].default]
        if self.mode != "stream" and changed:
            raise ValueError(f'{changed[0]} = {own[changed[0]]!r} is for mode = "stream", it is "{self.mode}"')
        if self.over_sampling > self.max_staleness:
            raise ValueError(
                f"over_sampling = {self.over_sampling:g} batches cannot be learned from within max_staleness = "
                f"{self.max_staleness} updates; set over_sampling to that at most, or raise max_staleness"
            )
        return self

    def fault(self, placement: str, correction: str, scoring: str, scope: str) -> str:
        """Why the mode cannot be, or would be wrong, with `inference.placement`, `algorithm.correction.mode`,
        `trainer.scoring` and `algorithm.stare.scope`; with the cure. "" where it is right."""
        if not self.ahead:
            return ""
        key = f'sampling.mode = "{self.mode}"'
        if placement != "separate" and self.mode == "one_step":
            return (
                f"{key} samples while the trainer works, so engines need devices of their own; set "
                'inference.placement = "separate", or sampling.mode = "sync" or "stream"'
            )
        if placement != "separate" and self.kv == "keep":
            return (
                'sampling.kv = "keep" keeps nothing where engines give their memory up to the trainer; set '
                'sampling.kv = "recompute", or inference.placement = "separate"'
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
        if scope == "microbatch" and self.mode == "stream":  # a batch of `one_step` has tokens of one age
            return (
                f'{key} mixes tokens of several ages, of which algorithm.stare.scope = "microbatch" would select the '
                'old ones; set algorithm.stare.scope = "batch", which selects within each age'
            )
        return ""
