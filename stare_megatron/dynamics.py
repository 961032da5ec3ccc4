"""What an optimizer step is expected to do to the policy's entropy: a part of `types.UpdateStats`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dynamics:
    """Sums over the action tokens of one optimizer step, over all ranks: see `algo.dynamics`.

    Tuples are by quadrant: A > 0 and likely (surprisal below the critical one), A > 0 and unlikely, A < 0 and likely,
    A < 0 and unlikely; tokens with A = 0 are in none. `tokens`: how many; `advantage`: |A|; `change`: predicted change
    of entropy -w A S, nats a unit step. `unweighted_change`: -A S over all quadrants; `critical_surprisal`: nats.
    `chosen_both`, `chosen_either`: tokens in both of, and in one of, the chosen set and the exact-sensitivity set.
    `non_finite`: terms left out of the sums. `num_tokens`: action tokens.
    """

    num_tokens: int
    tokens: tuple[int, ...]
    advantage: tuple[float, ...]
    change: tuple[float, ...]
    unweighted_change: float
    critical_surprisal: float
    chosen_both: int
    chosen_either: int
    non_finite: int
