"""Statistics of a few paired runs: pure functions of arrays. Differences are between two arms at the same seed.

With 5 seeds the smallest two-sided p of a sign-flip test is .0625, and a BCa bootstrap interval of 95 % covers 85 % (89 % with 10,
92 % with 20, of normal values): so verdicts rest on the paired t, and the bootstrap and the sign-flip test stand beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from keel.errors import KeelError

ALPHA, POWER = 0.05, 0.8
EXACT_FLIPS = 2**15  # of signs; beyond that many, so many are drawn
MOST_SEEDS = 10_000  # beyond them "how many seeds would tell" has no useful answer
RESAMPLES = 9_999
_BISECTIONS = 60


# ── means and intervals ───────────────────────────────────────────────────────────────────────────────────────────────


def t_interval(values: Float[np.ndarray, "*rows S"], level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Ends of Student's interval for the mean, along the last axis: infinite for one value.

    Source: Student, Biometrika 6 (1908). Differs from it: in nothing.
    """
    from scipy.stats import t  # takes its time to import

    n = values.shape[-1]
    mean = np.asarray(values.mean(-1))
    if n < 2:
        return np.full_like(mean, -math.inf), np.full_like(mean, math.inf)
    half = t.ppf(0.5 + level / 2, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return np.asarray(mean - half), np.asarray(mean + half)


def bootstrap_interval(
    values: Sequence[float] | Float[np.ndarray, " S"],
    seed: int,
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
) -> tuple[float, float]:
    """BCa bootstrap interval; of percentiles where BCa is not defined, and the value itself where all are the same.

    Source: B. Efron, JASA 82 (1987), as in scipy.stats.bootstrap. Differs from it: in the two cases named above.
    """
    from scipy.stats import bootstrap

    known = np.asarray(values, dtype=float)
    if len(known) == 0:
        return math.nan, math.nan
    if np.ptp(known) == 0.0:
        return float(known[0]), float(known[0])
    for method in ("BCa", "percentile"):
        with np.errstate(all="ignore"):
            found = bootstrap(
                (known,),
                statistic,
                n_resamples=RESAMPLES,
                confidence_level=level,
                method=method,
                rng=np.random.default_rng(seed),
                vectorized=True,
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def iqm(values: Float[np.ndarray, "*rows S"], axis: int = -1) -> np.ndarray:
    """Mean of the middle half: a quarter of the values, rounded down, is left out at each end.

    Source: Agarwal et al., arXiv 2108.13264. Differs from it: in nothing.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(values, 0.25, axis=axis))


def probability_of_improvement(a: Float[np.ndarray, " A"], b: Float[np.ndarray, " B"]) -> float:
    """Chance that a run of `a` ends above a run of `b` under another seed; a tie counts half.

    Source: Agarwal et al., arXiv 2108.13264. Differs from it: in nothing.
    """
    if not len(a) or not len(b):
        return math.nan
    above = np.asarray(a)[:, None] - np.asarray(b)[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


# ── tests ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rank_correlation(a: Float[np.ndarray, " K"], b: Float[np.ndarray, " K"]) -> float:
    """Spearman's ρ of K things measured twice; ties share their rank. NaN where a value is missing or all of one side are equal.

    Source: C. Spearman, Am. J. Psychol. 15 (1904). Differs from it: in nothing.
    """
    from scipy.stats import rankdata

    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def t_above(values: Float[np.ndarray, "*rows S"], bound: float = 0.0) -> np.ndarray:
    """One-sided p of the paired t test: small where the mean lies above `bound`.

    Where values have no spread at all, as coarse ones may, it is that of the sign-flip test: half to the power of their number.
    """
    from scipy.stats import t

    n = values.shape[-1]
    shift = np.asarray(values.mean(-1) - bound)
    if n < 2:
        return np.ones_like(shift)
    error = values.std(-1, ddof=1) / math.sqrt(n)
    flat = np.select([shift > 0, shift < 0], [0.5**n, 1 - 0.5**n], 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, t.sf(shift / error, n - 1), flat)


def sign_flip(values: Float[np.ndarray, " S"], seed: int, bound: float = 0.0) -> float:
    """Two-sided p of the sign-flip test for paired differences that are symmetric around `bound`.

    Exact over all 2^S signs while these are at most EXACT_FLIPS; else over so many seeded ones, among them none flipped.

    Source: R. A. Fisher, The design of experiments (1935), §21. Differs from it: in signs that are drawn where there are too many.
    """
    shifted = np.asarray(values, dtype=float) - bound
    n = len(shifted)
    if n == 0:
        return 1.0
    if 2**n <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(EXACT_FLIPS, n))
        signs[0] = 1.0
    means = np.abs(signs @ shifted)
    return float((means >= means[0] * (1 - 1e-12)).mean())


def holm(p: Sequence[float]) -> list[float]:
    """p values for all that are tested together: the smallest times their number, the next times one less, never decreasing.

    Source: S. Holm, Scand. J. Statist. 6 (1979). Differs from it: in nothing.
    """
    order = np.argsort(p, kind="stable")
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, float(p[index]) * (len(p) - rank)))
        adjusted[index] = worst
    return adjusted


# ── power ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def power(effect: float | np.ndarray, sd: float, seeds: int | np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Chance that a two-sided paired t test at `alpha` calls `effect` what it is, in its direction.

    Args:
        sd: of the paired differences.

    Source: noncentral t, J. Cohen, Statistical power analysis (1988). Differs from it: a call in the wrong direction is none.
    """
    from scipy.stats import nct, t

    seeds = np.asarray(seeds)
    shift = np.abs(effect) * np.sqrt(seeds) / sd
    return np.asarray(nct.sf(t.ppf(1 - alpha / 2, seeds - 1), seeds - 1, np.minimum(shift, 37.0)))


def equivalence_power(effect: float, margin: float, sd: float, seeds: int | np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Chance that two one-sided t tests at `alpha` find ±margin kept, where the true difference is `effect`: a lower bound.

    It takes the two as if each missed alone, which is close where the chance is high.

    Source: D. J. Schuirmann, J. Pharmacokin. Biopharm. 15 (1987). Differs from it: in the bound.
    """
    from scipy.stats import nct, t

    seeds = np.asarray(seeds)
    point = t.ppf(1 - alpha, seeds - 1)
    rooms = (np.clip((margin + side * effect) * np.sqrt(seeds) / sd, -37.0, 37.0) for side in (-1, 1))
    found = sum(nct.sf(point, seeds - 1, room) for room in rooms)
    return np.asarray(np.maximum(found - 1.0, 0.0))


def minimum_detectable(sd: float, seeds: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The effect that so many seeds find with a chance of `wanted`: infinite for one seed."""
    return _smallest(lambda effect: power(effect, 1.0, seeds, alpha), sd, seeds, wanted)


def minimum_margin(sd: float, seeds: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The margin that so many seeds show to be kept, with a chance of `wanted`, where there is no difference."""
    return _smallest(lambda margin: equivalence_power(0.0, margin, 1.0, seeds, alpha), sd, seeds, wanted)


def _smallest(chance: Callable[[float], np.ndarray], sd: float, seeds: int, wanted: float) -> float:
    """Where a growing chance of an effect, in standard deviations, reaches `wanted`; as an effect."""
    if seeds < 2 or not math.isfinite(sd):
        return math.inf
    low, high = 0.0, 1.0
    while chance(high) < wanted and high < 1e6:
        high *= 2
    for _ in range(_BISECTIONS if sd > 0 else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= wanted else (middle, high)
    return high * sd


def seeds_needed(chance: Callable[[np.ndarray], np.ndarray], wanted: float = POWER) -> int | None:
    """The fewest seeds at which `chance` of them reaches `wanted`; None beyond MOST_SEEDS.

    Args:
        chance: of numbers of seeds, growing with them: for example lambda n: power(0.02, 0.05, n).
    """
    low, high = 1, 2
    while chance(np.array(high)) < wanted:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(np.array(middle)) >= wanted else (middle, high)
    return high if high <= MOST_SEEDS else None


# ── survival ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Survival:
    """Share of runs that still stand after each step at which one fell, with its 95 % interval."""

    steps: tuple[float, ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def survival(fell: Sequence[float], stood: Sequence[float]) -> Survival:
    """Kaplan and Meier's curve.

    Args:
        fell: step at which each run that collapsed did.
        stood: last step of each run that did not.

    Raises:
        KeelError: there is no run.

    Source: Kaplan and Meier, JASA 53 (1958), as in scipy.stats.ecdf; interval: log-log. Differs from it: in nothing.
    """
    from scipy.stats import CensoredData, ecdf

    if not len(fell) and not len(stood):
        raise KeelError("A survival curve of no runs was asked for. Expected at least one run that collapsed or ended.")
    steps = tuple(float(step) for step in sorted(set(fell)))
    if not steps:
        return Survival((), (), (), ())
    found = ecdf(CensoredData(uncensored=np.asarray(fell, float), right=np.asarray(stood, float))).sf
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where the formula knows no end; those become 0 and 1 below
        between = found.confidence_interval(method="log-log")
    share = found.evaluate(np.asarray(steps))
    low, high = (np.where(np.isfinite(end), end, edge) for end, edge in (
        (between.low.evaluate(np.asarray(steps)), 0.0), (between.high.evaluate(np.asarray(steps)), 1.0)))  # fmt: skip
    return Survival(steps, *(tuple(map(float, values)) for values in (share, low, high)))
