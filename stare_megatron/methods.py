"""The registry of methods: which settings of `[algorithm]` each uses and its paper's defaults. No torch in here.

A method is one line of METHODS and one file, `stare_megatron/algo/losses/<name>.py`; see docs/adding_a_method.md.
"""

# A default given to Field by position is invisible to the type checker, which then misses arguments in `Section()`.
# pyright: reportCallIssue=false

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DapoConfig(Section):
    overlong_share: float = Field(
        0.2, ge=0, le=1, description="Last share of `response_tokens` over which the reward falls; 0: no shaping."
    )
    overlong_penalty: float = Field(1.0, ge=0, description="What a response of `response_tokens` loses of its reward.")


class ClipCovConfig(Section):
    fraction: float = Field(0.0002, gt=0, le=1, description="Share of the batch's action tokens that is detached.")
    low: float = Field(1.0, description="Covariance above which a token may be detached.")
    high: float = Field(5.0, description="Covariance below which a token may be detached.")


class KlCovConfig(Section):
    fraction: float = Field(
        0.0002, gt=0, le=1, description="Share of the batch's action tokens, those of largest covariance, penalised."
    )
    coefficient: float = Field(1.0, ge=0, description="Factor of the penalty |log ratio|.")


class EntropyBonusConfig(Section):
    coefficient: float = Field(0.001, description="Entropy coefficient, loss a nat; negative: entropy minimisation.")


class AdaptiveEntropyConfig(Section):
    target_entropy: float = Field(0.2, gt=0, description="Target entropy, nats a token; no bonus above it.")
    step: float = Field(0.0001, gt=0, description="What the coefficient moves by, each step of the loop.")
    maximum: float = Field(0.005, gt=0, description="Upper bound of the coefficient; the lower one is 0.")


class EntropyAdvantageConfig(Section):
    alpha: float = Field(0.4, ge=0, description="What a nat of the token's entropy adds to its advantage.")
    kappa: float = Field(2.0, gt=1, description="The addition is at most |A| / kappa, so that no sign changes.")


class HighEntropyTokensConfig(Section):
    fraction: float = Field(0.2, gt=0, le=1, description="Share of the batch's action tokens, by entropy, that learns.")


class WReinforceConfig(Section):
    positive_weight: float = Field(0.1, ge=0, description="lambda: advantage of a trajectory with a positive reward.")


@dataclass(frozen=True)
class Method:
    """`uses`: common settings that the method reads, besides the section of its own name, if it has one. `defaults`:
    its paper's, where they are not those of the key; a key that is only here cannot be set."""

    uses: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _uses(names: str) -> frozenset[str]:
    return frozenset(names.split())


_CLIP = "clip_low clip_high"
_GROUP = "normalize_std reduction"
_PPO = f"{_GROUP} {_CLIP} dual_clip"

METHODS: dict[str, Method] = {
    "grpo": Method(_uses(_PPO)),
    "dapo": Method(_uses(f"{_PPO} response_tokens")),
    "dr_grpo": Method(
        _uses(f"{_CLIP} dual_clip response_tokens"),
        {"normalize_std": False, "reduction": "sequence-mean-constant-length", "clip_high": 0.2},
    ),
    "gspo": Method(
        _uses(f"{_GROUP} {_CLIP}"), {"clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence-mean-token-mean"}
    ),
    "gmpo": Method(
        _uses(f"normalize_std {_CLIP}"), {"clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence-mean-token-mean"}
    ),
    "cispo": Method(_uses(f"{_GROUP} {_CLIP}"), {"clip_low": 1.0, "clip_high": 0.2}),
    "clip_cov": Method(_uses(f"{_GROUP} {_CLIP}"), {"clip_high": 0.2}),
    "kl_cov": Method(_uses(_GROUP)),
    "entropy_bonus": Method(_uses(_PPO)),
    "adaptive_entropy": Method(_uses(_PPO), {"clip_high": 0.2}),
    "entropy_advantage": Method(_uses(_PPO)),
    "high_entropy_tokens": Method(_uses(_PPO)),
    "w_reinforce": Method(_uses(f"reduction {_CLIP} dual_clip"), {"clip_high": 0.2}),
    "stare": Method(_uses(_PPO)),
}

EVERY_METHOD = frozenset({"method", "correction"})  # keys that all methods have


def settle(tree: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The table `[algorithm]` with the defaults of its method filled in.

    Raises:
        ValueError: no such method (names the nearest), or a setting that the method does not use.
    """
    name = tree.get("method", default)
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1, cutoff=0.0)
        raise ValueError(f"method = {name!r} is none of {', '.join(METHODS)}; did you mean {near[0]!r}?")
    method = METHODS[name]
    common = frozenset().union(*(m.uses | m.defaults.keys() for m in METHODS.values()))
    for key in tree:
        # The section of another method says by its name whom it is for: one file can be run with several methods.
        if key in common and key not in method.uses:
            fixed = f" (it is {method.defaults[key]!r} there)" if key in method.defaults else ""
            raise ValueError(
                f"{key} is not used by method {name!r}{fixed}; take it out, or choose a method that uses it"
            )
    return {**method.defaults, **tree}
