"""Accuracy as a sigmoid of compute: R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B).

Source: ScaleRL (arXiv 2510.13786, eq. 1). Weighted least squares by a bounded Levenberg-Marquardt, many fits at once:
the resamples of the bootstrap, or the points of a profile. Float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

R0, A, LOG_MID, LOG_B = range(4)
PARAMETERS = 4
_STEPS = 80
_MID_STARTS, _B_STARTS = 25, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_B_RANGE = (0.1, 12.0)


@dataclass(frozen=True)
class Points:
    """Evaluations of a size and method, all seeds. float64 [n]: `x`, compute so far (0: before the first step), `y`,
    accuracy, `se`, its standard error from the evaluation's own interval (0: not known); `seed`, int64 [n], from 0."""

    x: np.ndarray
    y: np.ndarray
    se: np.ndarray
    seed: np.ndarray

    @property
    def seeds(self) -> int:
        return len(np.unique(self.seed))

    def where(self, kept: np.ndarray) -> Points:
        return Points(self.x[kept], self.y[kept], self.se[kept], self.seed[kept])


@dataclass(frozen=True)
class Bounds:
    """Of the parameters, float64 [fits, 4]; equal ends hold a parameter fixed."""

    low: np.ndarray
    high: np.ndarray


def predict(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Accuracy at compute x, float64 [n], for parameters [..., 4] in the order R0, A, log C_mid, log B: [..., n]."""
    share = _share(theta, x)[0]
    return theta[..., R0, None] + (theta[..., A, None] - theta[..., R0, None]) * share


def compute_for(theta: np.ndarray, accuracy: float) -> float:
    """Compute at which one fit reaches an accuracy; NaN where it never does."""
    r0, a, log_mid, log_b = (float(v) for v in theta)
    if not r0 < accuracy < a:
        return float("nan")
    return float(np.exp(log_mid + np.log((accuracy - r0) / (a - accuracy)) / np.exp(log_b)))


def bounds(x: np.ndarray, fits: int) -> Bounds:
    """Accuracies in [0, 1]; C_mid from a hundredth of the least compute to 100 times the largest; B in 0.1 to 12."""
    seen = x[x > 0]
    low = [0.0, 0.0, np.log(seen.min() / 100), np.log(_B_RANGE[0])]
    high = [1.0, 1.0, np.log(seen.max() * 100), np.log(_B_RANGE[1])]
    return Bounds(np.tile(low, (fits, 1)), np.tile(high, (fits, 1)))


def fit(points: Points, weights: np.ndarray, box: Bounds, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares for each row of `weights`, float64 [fits, n].

    Each is started from the best of a grid and from each of `starts`, float64 [k, 4], and the better end is kept.

    Returns:
        Parameters, float64 [fits, 4], and weighted sums of squares, float64 [fits].
    """
    first = np.clip(_grid(points, weights, box), box.low, box.high)
    best, least = _descend(points, weights, box, first)
    for start in starts:
        theta, loss = _descend(points, weights, box, np.clip(np.tile(start, (len(weights), 1)), box.low, box.high))
        better = loss < least
        best[better], least[better] = theta[better], loss[better]
    return best, least


def _share(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far between R0 and A, [..., n], and (log x - log C_mid), 0 where x is 0."""
    seen = x > 0
    away = np.where(seen, np.log(np.where(seen, x, 1.0)) - theta[..., LOG_MID, None], 0.0)
    z = np.clip(np.exp(theta[..., LOG_B, None]) * away, -60, 60)
    return np.where(seen, 1 / (1 + np.exp(-z)), 0.0), away


def _grid(points: Points, weights: np.ndarray, box: Bounds) -> np.ndarray:
    """The best of a grid of C_mid and B, where R0 and A follow linearly (A as bounded): float64 [fits, 4]."""
    mids = np.linspace(box.low[0, LOG_MID], box.high[0, LOG_MID], _MID_STARTS)
    at = np.array([[0.0, 1.0, m, np.log(b)] for m in mids for b in _B_STARTS])
    s = _share(at, points.x)[0]  # [grid, n]
    rest = 1 - s
    ss, sr, rr = weights @ (s * s).T, weights @ (s * rest).T, weights @ (rest * rest).T  # [fits, grid]
    sy, ry = weights @ (s * points.y).T, weights @ (rest * points.y).T
    yy = (weights @ points.y**2)[:, None]
    det = ss * rr - sr**2
    safe = np.where(det > 1e-12 * np.maximum(ss * rr, 1e-300), det, np.inf)
    a = np.clip((sy * rr - ry * sr) / safe, box.low[:, A, None], box.high[:, A, None])
    r0 = np.clip((ry - a * sr) / np.maximum(rr, 1e-300), box.low[:, R0, None], box.high[:, R0, None])
    loss = yy - 2 * (a * sy + r0 * ry) + a**2 * ss + 2 * a * r0 * sr + r0**2 * rr
    chosen = np.argmin(loss, axis=1)
    rows = np.arange(len(weights))
    return np.stack([r0[rows, chosen], a[rows, chosen], at[chosen, LOG_MID], at[chosen, LOG_B]], axis=1)


def _descend(points: Points, weights: np.ndarray, box: Bounds, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt inside the box; a parameter at a bound that the gradient pushes outwards stays there."""
    theta = theta.copy()
    damping = np.full(len(theta), 1e-3)
    loss = _loss(points, weights, theta)
    eye = np.eye(PARAMETERS)
    for _ in range(_STEPS):
        jacobian, residual = _linear(points, theta)
        weighted = jacobian * weights[..., None]
        gradient = np.einsum("kni,kn->ki", weighted, residual)
        normal = np.einsum("kni,knj->kij", weighted, jacobian)
        held = ((theta <= box.low) & (gradient > 0)) | ((theta >= box.high) & (gradient < 0)) | (box.low == box.high)
        free = ~held
        normal = normal * free[:, :, None] * free[:, None, :]
        scale = np.einsum("kii->ki", normal)
        diagonal = np.where(free, damping[:, None] * scale + 1e-12 * (1 + scale), 1.0)
        step = -np.linalg.solve(normal + eye * diagonal[:, None, :], (gradient * free)[..., None])[..., 0]
        tried = np.clip(theta + np.clip(step, -2, 2), box.low, box.high)
        new = _loss(points, weights, tried)
        better = new < loss
        gained = float(np.max(np.where(better, (loss - new) / np.maximum(loss, 1e-300), 0.0), initial=0.0))
        theta[better], loss[better] = tried[better], new[better]
        damping = np.clip(np.where(better, damping / 5, damping * 10), 1e-6, 1e9)
        if gained < 1e-9 and bool(np.all(better | (damping > 1e2))):
            break
    return theta, loss


def _loss(points: Points, weights: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return np.sum(weights * (predict(theta, points.x) - points.y) ** 2, axis=1)


def _linear(points: Points, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the prediction by the parameters, float64 [fits, n, 4], and residuals [fits, n]."""
    share, away = _share(theta, points.x)
    gain = (theta[:, A] - theta[:, R0])[:, None]
    slope = np.exp(theta[:, LOG_B])[:, None]
    bend = gain * share * (1 - share)
    jacobian = np.stack([1 - share, share, -bend * slope, bend * slope * away], axis=2)
    return jacobian, predict(theta, points.x) - points.y
