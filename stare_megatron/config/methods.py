"""The registry of methods: which settings of `[algorithm]` each uses and its paper's defaults. No torch in here.

A method of the package is one line of METHODS and one file, `stare_megatron/algo/losses/<name>.py`; a user's is one
`Method` in a file of theirs. See docs/adding_a_method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from stare_megatron.config.base import Section
from stare_megatron.config.registry import Kind, Registry, absolute, is_address

Selector = Literal["surprisal", "relative", "sensitivity"]
TokenValue = Literal["entropy", "sensitivity"]  # what the trainer's scoring pass knows of a token, and no engine does
SELECTORS: dict[Selector, frozenset[TokenValue]] = {  # what each reads of a token, besides its log-prob
    "surprisal": frozenset(),
    "relative": frozenset({"entropy"}),
    "sensitivity": frozenset({"sensitivity"}),
}
_FIXED = (
    *("fraction", "selector", "scope"),
    *("weight_pos", "weight_neg", "controller", "adaptive", "alpha", "weight_pos_max", "weight_neg_min"),
)
_AUTO = ("time_constant", "weight_bound")
CONTROLLER_OF = {"band": "proportional", "kp": "proportional_integral", "ki": "proportional_integral"}


class DapoConfig(Section):
    overlong_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Last share of `response_tokens` over which the reward falls; 0: no shaping.",
    )
    overlong_penalty: float = Field(
        default=0.5,
        ge=0,
        description="What a response of `response_tokens` loses of its reward; for rewards of 0 and 1 (the paper: 1.0, "
        "for -1 and 1).",
    )


class ClipCovConfig(Section):
    fraction: float = Field(
        default=0.0002, gt=0, le=1, description="Share of the batch's action tokens that is detached."
    )
    low: float = Field(default=1.0, description="Covariance above which a token may be detached.")
    high: float = Field(default=5.0, description="Covariance below which a token may be detached.")

    @model_validator(mode="after")
    def _band(self) -> ClipCovConfig:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}: no token would be detached")
        return self


class KlCovConfig(Section):
    fraction: float = Field(
        default=0.002,
        gt=0,
        le=1,
        description="Share of the batch's action tokens, those of largest covariance, penalised.",
    )
    coefficient: float = Field(default=1.0, ge=0, description="Factor of the penalty |log ratio|.")


class EntropyBonusConfig(Section):
    coefficient: float = Field(
        default=0.001, description="Entropy coefficient, loss per nat; negative: entropy minimisation."
    )


class AdaptiveEntropyConfig(Section):
    target_entropy: float = Field(default=0.2, gt=0, description="Target entropy, nats per token; no bonus above it.")
    step: float = Field(default=0.0001, gt=0, description="What the coefficient moves by, each step of the loop.")
    maximum: float = Field(default=0.005, gt=0, description="Upper bound of the coefficient; the lower one is 0.")


class EntropyAdvantageConfig(Section):
    alpha: float = Field(default=0.4, ge=0, description="What a nat of the token's entropy adds to its advantage.")
    kappa: float = Field(default=2.0, gt=1, description="The addition is at most |A| / kappa, so that no sign changes.")


class HighEntropyTokensConfig(Section):
    fraction: float = Field(
        default=0.2, gt=0, le=1, description="Share of the batch's action tokens, by entropy, that learns."
    )


class WReinforceConfig(Section):
    positive_weight: float = Field(
        default=0.1, ge=0, description="lambda: advantage of a trajectory with a positive reward."
    )
    entropy_coefficient: float = Field(
        default=0.0001, ge=0, description="Factor of an entropy bonus, loss per nat; 0: none."
    )


class StareConfig(Section):
    variant: Literal["O1", "C2"] = Field(default="O1", description="O1: W on L+. C2: W on L+ and M on L-.")
    fraction: float = Field(
        default=0.1, gt=0, le=1, description="P: share of each subset taken as entropy-critical. Not for `auto`."
    )
    selector: Selector = Field(
        default="surprisal",
        description="Which tokens are critical: highest `surprisal` (the paper), highest surprisal less entropy "
        "(`relative`), or those whose step raises (L+) or lowers (L-) the entropy most (`sensitivity`).",
    )
    weight: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="`fixed`: the weights below, on a share P of the tokens (the paper). `auto`: each step the weights "
        "that the batch's own tokens need to hold the entropy at its target, on all tokens that can raise it.",
    )
    time_constant: float = Field(
        default=3.0, ge=1, description="`auto`: steps in which a gap between entropy and target is to close."
    )
    weight_bound: float = Field(default=50.0, gt=1, description="`auto`: upper bound of W; M is at least 1 / W.")
    weight_pos: float = Field(default=1.1, gt=0, description="W: weight of L+ (initial value when adaptive).")
    weight_neg: float = Field(
        default=0.9, gt=0, description="M: weight of L- in variant C2 (initial value when adaptive)."
    )
    target_entropy: float = Field(default=0.3, gt=0, description="H_tgt: the gate opens below it, nats per token.")
    target_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="How H_tgt moves over the run, from `target_entropy` to `target_entropy_end`."
    )
    target_entropy_end: float = Field(
        default=0.3, gt=0, description="H_tgt at the end of a `linear` or `cosine` schedule."
    )
    target_steps: int = Field(
        default=0, ge=0, description="Step from which a moving H_tgt is `target_entropy_end`; 0: the last, `run.steps`."
    )
    scope: Literal["batch", "microbatch"] = Field(
        default="batch",
        description="Where the quantile is taken: the whole update batch, or each micro-batch (the reference).",
    )
    controller: Literal["on_off", "proportional", "proportional_integral"] = Field(
        default="on_off",
        description="Below the target, the full weights (the paper); or weights in proportion to how far below it is; "
        "or weights by a proportional-integral controller, W and M at most.",
    )
    band: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="`proportional`: share of the target by which entropy is below it at full weights.",
    )
    kp: float = Field(
        default=15.0, ge=0, description="`proportional_integral`: what a nat below the target adds to the weight of L+."
    )
    ki: float = Field(
        default=0.5,
        ge=0,
        description="`proportional_integral`: the same, kept from step to step until entropy is above it.",
    )
    adaptive: bool = Field(default=False, description="Move W and M by `alpha` a step towards the target.")
    alpha: float = Field(default=0.01, gt=0, description="Step of the adaptive schedule.")
    weight_pos_max: float = Field(default=1.5, ge=1, description="Upper bound of an adaptive W.")
    weight_neg_min: float = Field(default=0.5, gt=0, le=1, description="Lower bound of an adaptive M.")

    def idle(self) -> str:
        """A setting that was changed and does nothing; "" if there is none."""
        adaptive = {"alpha": self.alpha, "weight_pos_max": self.weight_pos_max, "weight_neg_min": self.weight_neg_min}
        changed = [key for key, value in adaptive.items() if value != type(self).model_fields[key].default]
        if changed and not self.adaptive:
            return f"algorithm.stare.{changed[0]} = {adaptive[changed[0]]} is for algorithm.stare.adaptive = true"
        return ""

    @model_validator(mode="after")
    def _weight(self) -> StareConfig:
        other, keys = ("auto", _AUTO) if self.weight == "fixed" else ("fixed", (*_FIXED, *CONTROLLER_OF))
        for key in keys:
            if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                default = type(self).model_fields[key].default
                raise ValueError(f'stare.{key} is for stare.weight = "{other}"; leave it at its default, {default!r}')
        return self

    @model_validator(mode="after")
    def _controller(self) -> StareConfig:
        for key in sorted(self.model_fields_set & CONTROLLER_OF.keys()):
            if self.controller != CONTROLLER_OF[key]:
                raise ValueError(f'stare.{key} is for stare.controller = "{CONTROLLER_OF[key]}"')
        if self.controller != "on_off" and self.adaptive:
            raise ValueError('stare.adaptive is for stare.controller = "on_off": both would move the same weights')
        if self.controller == "proportional_integral":
            if self.weight_pos <= 1:
                raise ValueError(
                    f'stare.weight_pos = {self.weight_pos}: the bound of stare.controller = "proportional_integral" '
                    "must be above 1"
                )
            if self.kp == self.ki == 0:
                raise ValueError("stare.kp and stare.ki are both 0: the weights would never move; raise one")
        return self

    @model_validator(mode="after")
    def _target(self) -> StareConfig:
        moving = sorted(self.model_fields_set & {"target_entropy_end", "target_steps"})
        if self.target_schedule == "constant":
            if moving:
                raise ValueError(f'stare.{moving[0]} is for stare.target_schedule = "linear" or "cosine"')
        elif "target_entropy_end" not in moving:
            raise ValueError(f'stare.target_schedule = "{self.target_schedule}" needs stare.target_entropy_end')
        elif self.target_entropy_end == self.target_entropy:
            raise ValueError(
                f"stare.target_entropy_end = {self.target_entropy_end} is stare.target_entropy: it would not move"
            )
        return self

    @model_serializer(mode="wrap")
    def _settings_in_use(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what controller and target do not use, so that what was written can be read."""
        unused = {key for key, controller in CONTROLLER_OF.items() if controller != self.controller}
        unused |= set(_AUTO if self.weight == "fixed" else (*_FIXED, *CONTROLLER_OF))
        if self.target_schedule == "constant":
            unused |= {"target_entropy_end", "target_steps"}
        return {key: value for key, value in handler(self).items() if key not in unused}


class CorrectionConfig(Section):
    mode: Literal["none", "truncate", "mask"] = Field(
        default="none",
        description="Importance weight of trainer over engine: none, cut at `high`, or 0 outside [low, high].",
    )
    level: Literal["token", "sequence", "sequence-mean"] = Field(
        default="token",
        description="Ratio of a token, of its whole sequence (product), or the product's root by its length.",
    )
    high: float = Field(default=2.0, gt=0, description="Upper bound of the ratio.")
    low: float = Field(default=0.0, ge=0, description="Lower bound of the ratio, for `mask`; 0: none.")

    @model_validator(mode="after")
    def _bounds(self) -> CorrectionConfig:
        if self.mode == "none" and (self.level, self.high, self.low) != ("token", 2.0, 0.0):
            raise ValueError('correction.level, high and low are for correction.mode = "truncate" or "mask"')
        if self.mode == "truncate" and self.low:
            raise ValueError(f'correction.low = {self.low} is for correction.mode = "mask"')
        if self.low >= self.high:
            raise ValueError(f"correction.low {self.low} is not below correction.high {self.high}")
        return self


@dataclass(frozen=True)
class Method(Kind):
    """`uses`: common settings that the method reads, besides its own. `defaults`: its paper's, where they are not those
    of the key; a key that is only here cannot be set. `reads`: what its `weigh` takes of each token before the update,
    besides the log-prob; `stare` reads what its selector does. (The entropy that a loss takes is the update pass's
    own.) `seeks_target`: it steers towards a target entropy. `weighs_reward`: its advantage is of the reward's size,
    not of its sign alone.

    A method of the package has its settings in the section of `[algorithm]` with its name, and its `Algorithm` in its
    file. A user's brings both here: `settings`, the table `[algorithm.settings]`, and `algorithm`.
    """

    uses: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reads: frozenset[TokenValue] = frozenset()
    seeks_target: bool = False
    weighs_reward: bool = True
    algorithm: Any = None


def uses(names: str) -> frozenset[str]:
    """The keys of a string, which are separated by spaces."""
    return frozenset(names.split())


_CLIP = "clip_low clip_high"
_GROUP = "normalize_std reduction"
_PPO = f"{_GROUP} {_CLIP} dual_clip"
NO_DUAL_CLIP = 1e9  # above every ratio, which is at most e^20

_REGISTERED: dict[str, Method] = {
    "grpo": Method(uses(_PPO)),
    "dapo": Method(uses(f"{_PPO} response_tokens")),
    "dr_grpo": Method(
        uses(f"{_CLIP} dual_clip response_tokens"),
        {
            "normalize_std": False,
            "reduction": "sequence-mean-constant-length",
            "clip_high": 0.2,
            "dual_clip": NO_DUAL_CLIP,
        },
    ),
    "gspo": Method(
        uses(f"{_GROUP} {_CLIP}"), {"clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence-mean-token-mean"}
    ),
    "gmpo": Method(
        uses(f"normalize_std {_CLIP}"), {"clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence-mean-token-mean"}
    ),
    "cispo": Method(uses(f"{_GROUP} {_CLIP}"), {"clip_low": 1.0, "clip_high": 4.0}),
    "clip_cov": Method(uses(f"{_GROUP} {_CLIP}"), {"clip_low": 1.0, "clip_high": 1.0}),
    "kl_cov": Method(uses(_GROUP)),
    "entropy_bonus": Method(uses(_PPO)),
    "adaptive_entropy": Method(uses(_PPO), {"clip_high": 0.2, "dual_clip": NO_DUAL_CLIP}, seeks_target=True),
    "entropy_advantage": Method(uses(_PPO), reads=frozenset({"entropy"})),
    "high_entropy_tokens": Method(
        uses(f"normalize_std {_CLIP} dual_clip"), {"reduction": "token-mean"}, reads=frozenset({"entropy"})
    ),
    "w_reinforce": Method(
        uses(f"reduction {_CLIP} dual_clip"), {"clip_high": 0.2, "dual_clip": NO_DUAL_CLIP}, weighs_reward=False
    ),
    "stare": Method(uses(_PPO), seeks_target=True),
}


METHODS = Registry("algorithm.method", Method, _REGISTERED)

EVERY_METHOD = frozenset({"method", "correction", "kl", "settings"})  # keys that all methods have


def settle(tree: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The table `[algorithm]` with the defaults of its method filled in, and the path of a user's file made absolute.

    Raises:
        UserError: no such method (names the nearest).
        ValueError: a setting that the method does not use.
    """
    name = tree.get("method", default)
    if not isinstance(name, str):
        return dict(tree)
    name = absolute(name)
    method = METHODS[name]
    if is_address(name) and method.algorithm is None:
        raise ValueError(f"method = {name!r} has no algorithm; give one: Method(..., algorithm=Algorithm(loss))")
    common = frozenset().union(*(m.uses | m.defaults.keys() for m in METHODS.values()))
    for key in tree:
        # The section of another method says by its name whom it is for: one file can be run with several methods.
        if key in common and key not in method.uses:
            fixed = f" (it is {method.defaults[key]!r} there)" if key in method.defaults else ""
            raise ValueError(
                f"{key} is not used by method {name!r}{fixed}; take it out, or choose a method that uses it"
            )
    return {**method.defaults, **tree, "method": name}


_RAW = "engines record log-probs of the untempered, untruncated distribution, which is then not the one that sampled"


def correction_fault(correction: CorrectionConfig, temperature: float, top_p: float) -> str:
    """Why the rollout correction would be wrong at these settings of `[rollout]`; empty if it would not."""
    if correction.mode == "none" or (temperature == 1 and top_p == 1):
        return ""
    return (
        f"algorithm.correction.mode = {correction.mode!r} needs rollout.temperature = 1 and rollout.top_p = 1, not "
        f"{temperature} and {top_p}: {_RAW}"
    )


def rollout_scoring_fault(
    method: str, stare: StareConfig, updates_per_batch: int, temperature: float, top_p: float
) -> str:
    """Why `trainer.scoring = "rollout"` would be wrong under these settings, with the cure; empty if it would not."""
    key = 'trainer.scoring = "rollout"'
    if updates_per_batch > 1:
        return (
            f"{key} needs trainer.updates_per_batch = 1, not {updates_per_batch}: after the first update the weights "
            "are not those that sampled"
        )
    if temperature != 1 or top_p != 1:
        return f"{key} needs rollout.temperature = 1 and rollout.top_p = 1, not {temperature} and {top_p}: {_RAW}"
    reads, reader = METHODS[method].reads, f"algorithm.method = {method!r}"
    if method == "stare" and stare.scope == "batch":  # a micro-batch is weighed in the update pass
        reads, reader = SELECTORS[stare.selector], f"algorithm.stare.selector = {stare.selector!r}"
        if stare.weight == "auto":
            reads, reader = SELECTORS["sensitivity"], 'algorithm.stare.weight = "auto"'
    if reads:
        return (
            f"{key} knows no {' or '.join(sorted(reads))} of a token before its update, which {reader} needs; "
            'use trainer.scoring = "trainer"'
        )
    return ""
