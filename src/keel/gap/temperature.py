"""The temperature at which the trainer's log-probabilities fit the engine's best: the classic fault shows as one that is not 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

GRID = tuple(2.0 ** (step / 4) for step in range(-6, 7))  # .35 … 2.83, by 19 %
OFF = 0.03  # a factor away from 1 by less than this is not called a fault
HEALED = 0.9  # of the mean square gap is gone at a fault's temperature, at least: all of it but for rounding. A cut heals to .7


@dataclass(frozen=True)
class Fit:
    """Two best-fit factors on the trainer's temperature.

    Args:
        squared: that makes the mean square of the gap smallest: at which temperature the log-probabilities were *reported*.
        likelihood: that makes the sampled tokens likeliest: at which temperature they were *drawn*.
        likelihood_low, likelihood_high: its 95 % interval, read off the curvature.
        rms_nats: root mean square gap at factor 1.
        rms_best_nats: the same at `squared`.
    """

    squared: float
    likelihood: float
    likelihood_low: float
    likelihood_high: float
    rms_nats: float
    rms_best_nats: float

    @property
    def misreported(self) -> bool:
        """Whether another temperature, within the grid, explains nearly all of the gap."""
        other = abs(math.log(self.squared)) > OFF and GRID[0] < self.squared < GRID[-1]
        return other and self.rms_best_nats**2 <= (1 - HEALED) * self.rms_nats**2

    @property
    def misdrawn(self) -> bool | None:
        """Whether the tokens themselves come from the other temperature, and not only their log-probabilities; None where these
        tokens are compatible with both, or with neither.
        """
        as_asked, as_reported = (self.likelihood_low <= factor <= self.likelihood_high for factor in (1.0, self.squared))
        return None if as_asked == as_reported else as_reported and self.misreported


def fit_temperature(
    logp_at: Callable[[float], Float[Tensor, "B T"]], logp_rollout: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Fit:
    """Both factors, to about .002, from some twenty calls.

    Args:
        logp_at: factor on the temperature → the trainer's log-probabilities in nats.
        logp_rollout: the engine's.
        mask: tokens that count.
    """
    seen: dict[float, tuple[float, float]] = {}

    def losses(factor: float) -> tuple[float, float]:
        if factor not in seen:
            logp = logp_at(factor)[mask].double()
            gap = logp - logp_rollout[mask].double()
            seen[factor] = float(gap.square().mean()), float(-logp.mean())
        return seen[factor]

    squared = _lowest(lambda factor: losses(factor)[0])
    likelihood = _lowest(lambda factor: losses(factor)[1])
    spread = 1.96 * _standard_error(lambda factor: losses(factor)[1], likelihood, int(mask.sum()))
    around = (likelihood * math.exp(-spread), likelihood * math.exp(spread))
    return Fit(squared, likelihood, *around, math.sqrt(losses(1.0)[0]), math.sqrt(min(losses(squared)[0], losses(1.0)[0])))


def _lowest(loss: Callable[[float], float]) -> float:
    """The minimiser: the best of a grid, then twice a parabola through it and its neighbours, ever closer."""
    values = [loss(factor) for factor in GRID]
    place = min(range(len(GRID)), key=values.__getitem__)
    best, width = GRID[place], math.log(GRID[1] / GRID[0])
    for narrower in (4, 4):
        best = _vertex(loss, best, width)
        width /= narrower
    return _vertex(loss, best, width)


def _standard_error(loss: Callable[[float], float], best: float, tokens: int, width: float = 0.05) -> float:
    """Of log(best), where `loss` is the mean negative log-likelihood of that many tokens."""
    bend = (loss(best * math.exp(width)) - 2 * loss(best) + loss(best * math.exp(-width))) / width**2
    return 1 / math.sqrt(tokens * bend) if bend > 0 else math.inf


def _vertex(loss: Callable[[float], float], centre: float, width: float) -> float:
    """Where the parabola (in log factor) through three points is lowest; no further than a width away."""
    low, middle, high = (loss(centre * math.exp(step * width)) for step in (-1, 0, 1))
    bend = low - 2 * middle + high
    step = max(-1.0, min(1.0, 0.5 * (low - high) / bend)) if bend > 0 else 0.0
    return centre * math.exp(step * width)
