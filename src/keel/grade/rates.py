"""Shares with intervals, of answers that may come several to a question; and differences of two shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from keel.evaluate.estimates import Interval, wilson

NAN = float("nan")


@dataclass(frozen=True)
class Rate:
    """A share of answers, with a 95 % interval.

    Args:
        hits, of: counts; with `of` 0 the share is NaN, and anything between 0 and 1 is possible.
    """

    hits: int
    of: int
    mean: float
    low: float
    high: float


def rate(hit: Bool[np.ndarray, " N"], cluster: Sequence[str]) -> Rate:
    """The share of hits, with Wilson's interval for the number of independent tries that these answers amount to.

    Answers to one question are not independent. Their number of tries is p(1−p) over the variance of the share between
    questions, at least the questions and at most the answers; with no hit, or nothing else, the spread says nothing and every
    answer counts.

    Source: E. B. Wilson, JASA 22 (1927); L. Kish, Survey Sampling (1965), design effect. Differs from it: the bounds, as said.
    """
    n = len(hit)
    if n == 0:
        return Rate(0, 0, NAN, 0.0, 1.0)
    p = float(hit.mean())
    low, high = wilson(p, effective_tries(hit, cluster))
    return Rate(int(hit.sum()), n, p, low, high)


def numbered(cluster: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Each name's number, in the order in which names first appear."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(name, len(number)) for name in cluster], dtype=int)


def effective_tries(hit: Bool[np.ndarray, " N"], cluster: Sequence[str]) -> float:
    """How many independent tries tell as much about the share as these."""
    place = numbered(cluster)
    clusters, n, p = int(place.max()) + 1, len(hit), float(hit.mean())
    if p in (0.0, 1.0) or clusters < 2:
        return float(n)
    residual = np.bincount(place, weights=hit - p)
    variance = clusters / (clusters - 1) * float((residual**2).sum()) / n**2
    return float(min(max(p * (1 - p) / variance, clusters), n)) if variance > 0 else float(n)


def difference(a: Rate, b: Rate) -> Interval:
    """a − b of two independent shares.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 873–890, method 10. Differs from it: the shares' own intervals may
    count fewer tries than answers.
    """
    if not (a.of and b.of):
        return Interval(NAN, -1.0, 1.0)
    mean = a.mean - b.mean
    down = math.hypot(a.mean - a.low, b.high - b.mean)
    up = math.hypot(a.high - a.mean, b.mean - b.low)
    return Interval(mean, max(-1.0, mean - down), min(1.0, mean + up))


def resampled(
    statistic, columns: Sequence[np.ndarray], cluster: Sequence[str], *, seed: int = 0, draws: int = 1000
) -> Interval:  # fmt: skip
    """A statistic of some columns, with the middle 95 % of what it is on resampled questions, all answers of each together.

    Draws on which it is not defined (NaN) are left out.

    Source: B. Efron, Annals of Statistics 7 (1979), by clusters. Differs from it: in nothing.
    """
    place = numbered(cluster)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(int(place.max()) + 2))
    members = [order[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = np.concatenate([members[c] for c in rng.integers(len(members), size=len(members))])
        found.append(statistic(*(column[rows] for column in columns)))
    kept = np.array([value for value in found if value == value])
    low, high = np.quantile(kept, [0.025, 0.975]) if len(kept) else (NAN, NAN)
    return Interval(float(statistic(*columns)), float(low), float(high))


def auc(score: Float[np.ndarray, " N"], hit: Bool[np.ndarray, " N"]) -> Interval:
    """Chance that a hit's score is above a non-hit's (ties count half): .5 says nothing. With DeLong's interval.

    Source: E. R. DeLong et al., Biometrics 44 (1988). Differs from it: in nothing.
    """
    ones, zeros = score[hit], score[~hit]
    if len(ones) < 2 or len(zeros) < 2:
        return Interval(NAN, 0.0, 1.0)
    of_one = _below(zeros, ones)
    of_zero = 1 - _below(ones, zeros)
    mean = float(of_one.mean())
    half = 1.96 * math.sqrt(float(of_one.var(ddof=1)) / len(ones) + float(of_zero.var(ddof=1)) / len(zeros))
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _below(them: np.ndarray, points: np.ndarray) -> np.ndarray:
    """For each point the share of `them` below it, ties half."""
    ordered = np.sort(them)
    return (np.searchsorted(ordered, points, "left") + np.searchsorted(ordered, points, "right")) / (2 * len(them))
