"""How likely a number is without a fault: the null distributions of alarms. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

CARD_ALPHA = 1e-3  # chance that a healthy card has any alarm
TESTS = 24  # statistical tests on one card, at most: each gets its share of that chance (Bonferroni)
ALPHA = CARD_ALPHA / TESTS


def normal_tail(z: float) -> float:
    """Chance that a standard normal is further from 0 than z."""
    return math.erfc(abs(z) / math.sqrt(2))


def martingale_z(differences: Sequence[float], variances: Sequence[float]) -> float:
    """Sum of observed minus expected over its standard deviation: about standard normal whatever depends on what came before.

    Args:
        differences: each observation less what was expected of it, given all earlier ones.
        variances: of each, given the same.
    """
    total = sum(variances)
    return sum(differences) / math.sqrt(total) if total > 0 else 0.0


def more_than_expected(count: int, expected: float) -> float:
    """Bound on the chance of `count` or more events whose conditional chances add up to `expected`.

    exp(k − λ − k·log(k/λ)) for k > λ: the exponential supermartingale, which asks for no independence.

    Source: D. A. Freedman, Annals of Probability 3 (1975). Differs from it: in taking the realised sum for its bound.
    """
    if count <= expected:
        return 1.0
    if expected <= 0:
        return 0.0
    return math.exp(count - expected - count * math.log(count / expected))


def at_most_bound(successes: int, tries: int, alpha: float = CARD_ALPHA) -> float:
    """The largest success rate that these tries do not rule out at `alpha` (Clopper–Pearson)."""
    from scipy.stats import beta  # takes its time to import

    return 1.0 if successes >= tries else float(beta.ppf(1 - alpha, successes + 1, tries - successes))


def at_least_bound(successes: int, tries: int, alpha: float = CARD_ALPHA) -> float:
    """The smallest success rate that these tries do not rule out at `alpha` (Clopper–Pearson)."""
    from scipy.stats import beta

    return 0.0 if successes == 0 else float(beta.ppf(alpha, successes, tries - successes + 1))


def live_share(p: float, group_size: int) -> float:
    """Share of groups with right and wrong answers where every completion is right with chance p: 1 − p^G − (1−p)^G."""
    return 1.0 - p**group_size - (1.0 - p) ** group_size


def live_share_of(right: int, tries: int, group_size: int) -> float:
    """The same for one prompt, without bias from its counts: 1 − C(right, G)/C(tries, G) − C(wrong, G)/C(tries, G).

    Where there are fewer tries than G, the mean over the beta distribution that the counts leave, from a uniform one.
    """
    if tries >= group_size:
        ways = math.comb(tries, group_size)
        return 1.0 - (math.comb(right, group_size) + math.comb(tries - right, group_size)) / ways
    a, b = right + 1, tries - right + 1
    everybody = math.prod((a + i) / (a + b + i) for i in range(group_size))
    nobody = math.prod((b + i) / (a + b + i) for i in range(group_size))
    return 1.0 - everybody - nobody


def more_of_two(hits: int, tries: int, hits_floor: int, tries_floor: int) -> float:
    """Chance of so many hits among `tries`, were hits spread over both sets alike (Fisher's exact test, one-sided)."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(hits - 1, tries + tries_floor, hits + hits_floor, tries))
