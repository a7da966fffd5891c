"""Reward against compute: a sigmoid fitted on the first half of a run, and how far it misses the second."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

FEWEST = 4  # points after the start, for three parameters
SLOPES = (0.2, 8.0)


def sigmoid(compute: Float[np.ndarray, " n"], start: float, end: float, middle: float, slope: float) -> Float[np.ndarray, " n"]:
    """R(C) = start + (end − start) / (1 + (middle/C)^slope): the start at C = 0, halfway at `middle`, the end for ever more.

    Source: The art of scaling RL compute, arXiv 2510.13786, eq. 1. Differs from it: in nothing.
    """
    with np.errstate(divide="ignore", over="ignore"):
        return start + (end - start) / (1.0 + (middle / compute) ** slope)


def fitted(compute: Float[np.ndarray, " n"], reward: Float[np.ndarray, " n"]) -> tuple[float, float, float, float]:
    """(start, end, middle, slope) of least squares; the start is the first point's. NaN with fewer than `FEWEST` points after it.

    Args:
        compute: ascending, 0 first, for example generated tokens.
        reward: in [0, 1].
    """
    from scipy.optimize import least_squares

    if len(compute) < FEWEST + 1:
        return (math.nan,) * 4
    start, scale = float(reward[0]), float(compute[-1])

    def residuals(p: np.ndarray) -> np.ndarray:
        return sigmoid(compute[1:], start, p[0], scale * math.exp(p[1]), p[2]) - reward[1:]

    best = min(
        (
            least_squares(residuals, (end, place, 1.0), bounds=((0.0, -7.0, SLOPES[0]), (1.0, 7.0, SLOPES[1])))
            for end in (min(0.99, float(reward.max())), 0.5 * (1 + float(reward.max())))
            for place in (-1.5, 0.0)
        ),
        key=lambda found: found.cost,
    )
    return start, float(best.x[0]), scale * math.exp(best.x[1]), float(best.x[2])


def misses(compute: Float[np.ndarray, " n"], reward: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean distance, over the second half of the compute, between what was seen and the sigmoid fitted on the first half; and the
    same of standing still, at the last value of that half.
    """
    first = compute <= compute[-1] / 2
    parameters = fitted(compute[first], reward[first])
    if first.all() or not math.isfinite(parameters[1]):
        return math.nan, math.nan
    ahead, seen = sigmoid(compute[~first], *parameters), reward[~first]
    return float(np.abs(ahead - seen).mean()), float(np.abs(reward[first][-1] - seen).mean())
