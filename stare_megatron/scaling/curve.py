"""The sigmoid of one size and method: its parameters with intervals over seeds, or why they are not given; how well the
first half of the compute predicts the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stare_megatron.scaling.intervals import Estimate, Refusal, bootstrap_interval, resamples, t_quantile
from stare_megatron.scaling.sigmoid import LOG_B, LOG_MID, PARAMETERS, R0, A, Bounds, Points, bounds, fit, predict

LEAST_EVALUATIONS, LEAST_TO_HOLD_OUT = 6, 5  # a seed
HELD_OUT_FROM = 0.5  # of the largest compute
_PROFILE = 40  # asymptotes tried
_FLAT = 4.0  # F of 3 and some twenty or more degrees of freedom at about 98 %
_UNBENT = 0.5  # width of the profile's interval of A, by the gain seen


@dataclass(frozen=True)
class Profile:
    """How well each asymptote fits when the other parameters follow it. float64 [40]: `a`, asymptotes; `excess`, sum of
    squares by the least one, less 1; `low`, `high`: ends of the asymptotes that a 95 % F bound of `limit` allows."""

    a: np.ndarray
    excess: np.ndarray
    limit: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A sigmoid that is told. `theta`: R0, A, log C_mid, log B, float64 [4]; `mid`: compute of half the gain; `b`:
    exponent; `rmse`: of the residuals; `largest`: compute of the last evaluation."""

    theta: np.ndarray
    r0: Estimate
    a: Estimate
    mid: Estimate
    b: Estimate
    rmse: float
    largest: float
    profile: Profile


@dataclass(frozen=True)
class Unfinished:
    """A fit whose asymptote is not told, as the points do not decide it. `theta`: describes the points inside their
    range and nothing beyond; `profile`: see there."""

    reason: str
    theta: np.ndarray
    profile: Profile


@dataclass(frozen=True)
class HeldOut:
    """Prediction of the evaluations beyond `cut` from those up to it. Errors in accuracy: `rmse`; `bias`, mean of
    predicted less measured; `carried`, rmse of repeating the last accuracy seen; `noise`, mean standard error of an
    evaluation (0: not known). `n`: evaluations held out; `bent`: whether the part fitted told its asymptote."""

    cut: float
    n: int
    rmse: float
    bias: float
    carried: float
    noise: float
    bent: bool


def fit_curve(points: Points) -> Curve | Unfinished | Refusal:
    """The sigmoid of one size and method, or the sentence that says why there is none."""
    few = _too_few(points, LEAST_EVALUATIONS)
    if few is not None:
        return few
    weights = error_weights(points)
    theta, least = _best(points, weights)
    reason = _flat(points, weights, theta, least)
    if reason:
        return Refusal(reason)
    found = _profile(points, weights, theta, least)
    largest = float(points.x.max())
    reason = _not_bent(theta, found, largest)
    if reason:
        return Unfinished(reason, theta, found)
    counts, probable = resamples(points.seeds)
    replicates, _ = fit(points, weights * counts[:, points.seed], bounds(points.x, len(counts)), theta[None])

    def interval(parameter: int) -> Estimate:
        return bootstrap_interval(float(theta[parameter]), replicates[:, parameter], probable, points.seeds)

    residual = predict(theta, points.x) - points.y
    return Curve(
        theta=theta,
        r0=interval(R0).within(0.0, 1.0),
        a=interval(A).within(0.0, 1.0),
        mid=_exp(interval(LOG_MID)),
        b=_exp(interval(LOG_B)),
        rmse=float(np.sqrt(np.mean(residual**2))),
        largest=largest,
        profile=found,
    )


def hold_out(points: Points) -> HeldOut | Refusal:
    """Fit the evaluations up to half of the largest compute, predict the others."""
    cut = HELD_OUT_FROM * float(points.x.max())
    early, late = points.where(points.x <= cut), points.where(points.x > cut)
    few = _too_few(early, LEAST_TO_HOLD_OUT)
    if few is not None or early.seeds < points.seeds:
        return Refusal(f"up to half of the compute there are fewer than {LEAST_TO_HOLD_OUT} evaluations a seed")
    theta, _ = _best(early, error_weights(early))
    error = predict(theta, late.x) - late.y
    last = {int(s): early.y[early.seed == s][np.argmax(early.x[early.seed == s])] for s in np.unique(early.seed)}
    carried = np.array([last[int(s)] for s in late.seed]) - late.y
    return HeldOut(
        cut=cut,
        n=len(late.x),
        rmse=float(np.sqrt(np.mean(error**2))),
        bias=float(np.mean(error)),
        carried=float(np.sqrt(np.mean(carried**2))),
        noise=float(np.mean(late.se)),
        bent=isinstance(fit_curve(early), Curve),
    )


def error_weights(points: Points) -> np.ndarray:
    """1 / (variance of the evaluation + variance of the runs), float64 [n]; the second is what the residuals of an
    unweighted fit have beyond the first."""
    plain = np.ones(len(points.x))
    _, loss = _best(points, plain)
    residual = loss / max(1, len(points.x) - PARAMETERS)
    runs = max(residual - float(np.mean(points.se**2)), 0.1 * residual, 1e-12)
    return 1 / (points.se**2 + runs)


def _best(points: Points, weights: np.ndarray) -> tuple[np.ndarray, float]:
    theta, loss = fit(points, weights[None], bounds(points.x, 1), np.empty((0, PARAMETERS)))
    return theta[0], float(loss[0])


def _too_few(points: Points, least: int) -> Refusal | None:
    if not len(points.x) or not np.any(points.x > 0):
        return Refusal("there is no evaluation after the first step; set eval.every")
    counts = [int(np.sum(points.seed == s)) for s in np.unique(points.seed)]
    if min(counts) < least:
        return Refusal(f"{min(counts)} evaluations of a run are too few for a sigmoid, which takes {least} or more")
    return None


def _flat(points: Points, weights: np.ndarray, theta: np.ndarray, least: float) -> str:
    mean = float(np.sum(weights * points.y) / np.sum(weights))
    constant = float(np.sum(weights * (points.y - mean) ** 2))
    free = max(1, len(points.x) - PARAMETERS)
    if (constant - least) / (PARAMETERS - 1) <= _FLAT * least / free:  # both 0: nothing was ever right
        return "the curve is flat: a constant accuracy fits about as well as a sigmoid, so there is nothing to scale"
    if theta[A] <= theta[R0]:
        return f"accuracy falls, from {theta[R0]:.3f} towards {theta[A]:.3f}: this is no learning curve"
    return ""


def _profile(points: Points, weights: np.ndarray, theta: np.ndarray, least: float) -> Profile:
    tried = np.linspace(min(1.0, max(0.01, float(theta[R0]) + 0.01)), 1.0, _PROFILE)
    box = bounds(points.x, _PROFILE)
    low, high = box.low.copy(), box.high.copy()
    low[:, A] = high[:, A] = tried
    shifted = np.tile(theta, (2, 1))
    shifted[1, LOG_MID] += 2.0
    _, loss = fit(points, np.tile(weights, (_PROFILE, 1)), Bounds(low, high), shifted)
    free = max(1, len(points.x) - PARAMETERS)
    floor = max(least, 1e-12)
    excess = np.maximum(loss / floor - 1, 0.0)
    limit = t_quantile(free) ** 2 / free
    allowed = tried[excess <= limit]
    ends = (float(allowed.min()), float(allowed.max())) if len(allowed) else (float(theta[A]), float(theta[A]))
    return Profile(tried, excess, limit, min(ends[0], float(theta[A])), max(ends[1], float(theta[A])))


def _not_bent(theta: np.ndarray, found: Profile, largest: float) -> str:
    gain = float(predict(theta, np.array([largest]))[0] - theta[R0])
    if found.high - found.low > _UNBENT * gain:
        return (
            f"the curve has not bent: any asymptote from {found.low:.2f} to {found.high:.2f} fits as well, so none is "
            "given; train longer"
        )
    if theta[LOG_MID] > math.log(largest):
        return "the curve has not bent: by its own fit half of the gain lies beyond the last evaluation; train longer"
    return ""


def _exp(e: Estimate) -> Estimate:
    low, high = (None if end is None else math.exp(min(700.0, max(-700.0, end))) for end in (e.low, e.high))
    return Estimate(math.exp(e.value), low, high, e.n)
