"""How far two judgements of the same answers agree beyond chance: a grader's with the labels, or two graders' with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from keel.grade.rates import Interval, Rate, rate, resampled
from keel.grade.verdicts import Verdicts


def nearest_level(value: Float[np.ndarray, " N"], levels: Float[np.ndarray, " L"]) -> Int[np.ndarray, " N"]:
    """Index of the level next to each value; the lower one of two that are as near."""
    return np.abs(value[:, None] - levels).argmin(1)


def confusion(a: Int[np.ndarray, " N"], b: Int[np.ndarray, " N"], levels: int) -> Int[np.ndarray, "L L"]:
    """How many answers the first calls row and the second calls column."""
    table = np.zeros((levels, levels), dtype=int)
    np.add.at(table, (a, b), 1)
    return table


def kappa(a: Int[np.ndarray, " N"], b: Int[np.ndarray, " N"], levels: int, squared: bool = False) -> float:
    """Cohen's κ: 1 − disagreement / the disagreement that two independent judges with these habits would have.

    1 is full agreement, 0 what chance gives. NaN where one level is all that both ever say.

    Args:
        squared: a disagreement weighs the square of the distance between its levels, else 1.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960), Psychological Bulletin 70 (1968). Differs from it: in
    nothing.
    """
    table = confusion(a, b, levels) / max(1, len(a))
    distance = np.abs(np.subtract.outer(np.arange(levels), np.arange(levels)))
    weight = distance**2 if squared else (distance > 0)
    expected = float((weight * np.outer(table.sum(1), table.sum(0))).sum())
    return 1 - float((weight * table).sum()) / expected if expected > 0 else float("nan")


@dataclass(frozen=True)
class Levels:
    """A grader against labels that have levels, over its scorable verdicts.

    Args:
        levels: the labels' own, rising.
        table: [L, L] rows are labels, columns the level next to the verdict.
        kappa, kappa_squared: unweighted, and with squared weights.
        mean: the verdict's mean at each level.
    """

    levels: tuple[float, ...]
    table: list[list[int]]
    kappa: Interval
    kappa_squared: Interval
    mean: tuple[float, ...]


def against_levels(value: Float[np.ndarray, " N"], label: Float[np.ndarray, " N"], cluster: Sequence[str], seed: int = 0) -> Levels:
    """Confusion and κ with intervals; every value is scorable, every label there."""
    levels = np.unique(label)
    said, truth = nearest_level(value, levels), nearest_level(label, levels)
    both = [resampled(partial(kappa, levels=len(levels), squared=w), (truth, said), cluster, seed=seed) for w in (False, True)]
    means = tuple(float(value[truth == index].mean()) for index in range(len(levels)))
    return Levels(tuple(map(float, levels)), confusion(truth, said, len(levels)).tolist(), both[0], both[1], means)


@dataclass(frozen=True)
class Pairwise:
    """Two graders on the answers that both could score.

    Args:
        agree: share of equal verdicts.
        kappa: beyond chance.
        only_a, only_b: answers that only the one calls right.
        a_right, b_right: of those on which they differ, how many each has right; None without labels.
        p: chance of such a split of their differences if both were right as often (sign test, two-sided); None without labels.
        rows: first lines on which they differ.
    """

    a: str
    b: str
    agree: Rate
    kappa: float
    only_a: int
    only_b: int
    a_right: int | None
    b_right: int | None
    p: float | None
    rows: tuple[int, ...]


def compare(
    a: Verdicts, b: Verdicts, cluster: Sequence[str], lines: Sequence[int], right: Bool[np.ndarray, " N"] | None, shown: int = 5
) -> Pairwise:
    """Agreement of two graders.

    Args:
        lines: of the file, for those on which they differ.
        right: [N] the truth; None without labels.

    Source: for `p`, Q. McNemar, Psychometrika 12 (1947), exact. Differs from it: in nothing.
    """
    from scipy.stats import binomtest

    both = a.scorable & b.scorable
    differ = both & (a.passed != b.passed)
    split = None if right is None else (int((differ & (a.passed == right)).sum()), int((differ & (b.passed == right)).sum()))
    places = np.flatnonzero(both)
    return Pairwise(
        a=a.name,
        b=b.name,
        agree=rate(~differ[places], [cluster[i] for i in places]),
        kappa=kappa(a.passed[places].astype(int), b.passed[places].astype(int), 2),
        only_a=int((differ & a.passed).sum()),
        only_b=int((differ & b.passed).sum()),
        a_right=split and split[0],
        b_right=split and split[1],
        p=None if split is None else float(binomtest(split[0], sum(split)).pvalue) if sum(split) else 1.0,
        rows=tuple(int(lines[i]) for i in np.flatnonzero(differ)[:shown]),
    )
