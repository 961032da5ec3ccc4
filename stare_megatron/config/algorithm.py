"""Settings of the objective: `[algorithm]`; those of one method alone are in `methods.py`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from stare_megatron.config import methods
from stare_megatron.config.base import Section, Text
from stare_megatron.config.kl import KlConfig
from stare_megatron.config.methods import CorrectionConfig, StareConfig
from stare_megatron.config.registry import Choice


class AlgorithmConfig(Choice):
    """Defaults that a method's paper has otherwise are in `methods.METHODS`."""

    chooser: ClassVar[str] = "method"
    registry: ClassVar[str] = "stare_megatron.config.methods:METHODS"

    method: Text = Field(
        default="stare",
        description="Method: a name from the registry, its page is docs/algorithms/NAME.md; or your own, "
        "`package.module:object` or `path/to/file.py:object`, docs/adding_a_method.md.",
    )
    settings: SerializeAsAny[Section] = Field(
        default_factory=Section, validate_default=True, description="Settings of a method of your own."
    )
    normalize_std: bool = Field(
        default=True, description="Divide the group-relative advantage by the group's std + 1e-6."
    )
    clip_low: float = Field(default=0.2, gt=0, le=1, description="eps_low of the clipped ratio; 1: no lower bound.")
    clip_high: float = Field(default=0.28, gt=0, description="eps_high of the clipped ratio.")
    dual_clip: float = Field(default=10.0, gt=1, description="c: bound on the loss of negative advantages, as a ratio.")
    reduction: Literal[
        "token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "sequence-mean-constant-length"
    ] = Field(
        default="token-mean",
        description="How per-token losses become one number; denominators are those of the whole batch.",
    )
    response_tokens: int = Field(
        default=0,
        ge=0,
        description="Response length that `dapo` and `dr_grpo` count by; 0: `rollout.max_response_tokens`.",
    )
    correction: CorrectionConfig = Field(
        default_factory=lambda: CorrectionConfig(),
        description="Rollout correction: weights for what trainer and engine disagree about.",
    )
    kl: KlConfig = Field(
        default_factory=lambda: KlConfig(), description="KL to a reference policy, in the loss or the reward."
    )
    dapo: methods.DapoConfig = Field(default_factory=lambda: methods.DapoConfig(), description="Settings of `dapo`.")
    clip_cov: methods.ClipCovConfig = Field(
        default_factory=lambda: methods.ClipCovConfig(), description="Settings of method `clip_cov`."
    )
    kl_cov: methods.KlCovConfig = Field(
        default_factory=lambda: methods.KlCovConfig(), description="Settings of method `kl_cov`."
    )
    entropy_bonus: methods.EntropyBonusConfig = Field(
        default_factory=lambda: methods.EntropyBonusConfig(), description="Settings of method `entropy_bonus`."
    )
    adaptive_entropy: methods.AdaptiveEntropyConfig = Field(
        default_factory=lambda: methods.AdaptiveEntropyConfig(), description="Settings of method `adaptive_entropy`."
    )
    entropy_advantage: methods.EntropyAdvantageConfig = Field(
        default_factory=lambda: methods.EntropyAdvantageConfig(), description="Settings of method `entropy_advantage`."
    )
    high_entropy_tokens: methods.HighEntropyTokensConfig = Field(
        default_factory=lambda: methods.HighEntropyTokensConfig(),
        description="Settings of method `high_entropy_tokens`.",
    )
    w_reinforce: methods.WReinforceConfig = Field(
        default_factory=lambda: methods.WReinforceConfig(), description="Settings of method `w_reinforce`."
    )
    stare: StareConfig = Field(default_factory=lambda: StareConfig(), description="Settings of method `stare`.")

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, tree: Any) -> Any:
        return methods.settle(tree, cls.model_fields["method"].default) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _penalty(self) -> AlgorithmConfig:
        if self.kl.on and self.kl.place == "reward" and not methods.METHODS[self.method].weighs_reward:
            raise ValueError(
                f'kl.place = "reward": method {self.method!r} reads no more of a reward than its sign; set kl.place = '
                '"loss"'
            )
        return self

    @field_validator("settings", mode="before")
    @classmethod
    def _own(cls, tree: Any, info: ValidationInfo) -> Any:
        kind = cls.kinds()[info.data["method"]].settings if "method" in info.data else Section
        return tree if type(tree) is kind else kind.model_validate({} if isinstance(tree, Section) else tree)

    @model_serializer(mode="wrap")
    def _settings_in_use(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the method does not use, so that what was written can be read."""
        kept = methods.METHODS[self.method].uses | methods.EVERY_METHOD | {self.method}
        return {key: value for key, value in handler(self).items() if key in kept and value != {}}
