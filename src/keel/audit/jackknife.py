"""Norms, angles and variances of mean gradients from few samples, without the noise floor, each with its 95 % interval.

The squared norm of a sample mean is the truth plus variance/n: with noisy gradients mostly the latter. Here every product of two
means is taken over pairs of *different* samples (a U-statistic), which leaves no such floor. A statistic is a tensor [1 + n]: its
value, then its values with each sample left out; arithmetic on statistics is arithmetic on these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

FARTHEST = 4.0  # a wanted number of samples is never guessed beyond so many times those at hand

Statistic = Float[Tensor, " n_plus_1"]
Samples = Float[Tensor, "n m"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Args:
        value: NaN where the samples do not give one.
        low, high: the interval; as wide as the number's range where the samples say nothing.
        samples: independent ones that it rests on.
        more: about how many more it would take to say anything; 0 where it says something.
    """

    value: float
    low: float
    high: float
    samples: int
    more: int = 0

    @property
    def enough(self) -> bool:
        return self.more == 0

    def through(self, rising: Callable[[float], float]) -> Estimate:
        """The estimate of a rising function of the number."""
        return replace(self, value=rising(self.value), low=rising(self.low), high=rising(self.high))

    def wanted(self, unit: int = 1) -> str:
        """How many more samples it would take, in words; `unit` is what one sample counts for."""
        guess = self.more * unit
        digits = max(0, len(str(guess)) - 2)
        capped = self.more >= self.samples * (FARTHEST - 1)
        return f"{'at least' if capped else 'about'} {-(-guess // 10**digits) * 10**digits:,} more"

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "-"
        if self.low == self.high:
            return f"{_short(self.value)} exactly"
        return f"{_short(self.value)} ({_short(self.low)} – {_short(self.high)})"


def exactly(value: float, samples: int) -> Estimate:
    """A number that no sample can change; NaN for one that does not exist."""
    return Estimate(value, value, value, samples)


def product(a: Samples, b: Samples) -> Statistic:
    """⟨E a, E b⟩ without bias: the mean of ⟨aᵢ, bⱼ⟩ over all i ≠ j."""
    n, own = len(a), (a * b).sum(1)
    total_a, total_b = a.sum(0), b.sum(0)
    whole = total_a @ total_b - own.sum()
    without = whole - a @ total_b - b @ total_a + 2 * own
    return torch.cat([(whole / (n * (n - 1)))[None], without / ((n - 1) * (n - 2))])


def mean(x: Float[Tensor, " n"]) -> Statistic:
    """E x."""
    n, total = len(x), x.sum()
    return torch.cat([(total / n)[None], (total - x) / (n - 1)])


def spread(a: Samples) -> Statistic:
    """Trace of the covariance of a, without bias."""
    return mean(a.square().sum(1)) - product(a, a)


def multiple(a: Samples, b: Samples, tolerance: float = 1e-4) -> float | None:
    """The s for which a = s·b in every sample, up to rounding; None where there is none."""
    size = float(b.square().sum())
    scale = float((a * b).sum()) / size if size > 0 else 0.0
    left = float((a - scale * b).square().sum())
    return scale if scale and left <= tolerance**2 * float(a.square().sum()) else None


def root(squared: Statistic) -> Statistic:
    """The square root of a statistic that is a squared norm, and may have come out below zero."""
    return squared.clamp(min=0.0).sqrt()


def ratio(
    over: Statistic,
    under: Statistic,
    *,
    sure: Sequence[Statistic] = (),
    within: tuple[float, float] = (-math.inf, math.inf),
    silent: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """over / under with the interval of all r for which over − r·under is compatible with zero.

    The interval is as wide as can be where `under`, or one of `sure`, is compatible with zero or less.

    Args:
        sure: statistics that must be above zero for the ratio to mean anything.
        within: the range of the result.
        silent: an interval that covers all of this says nothing.

    Source: E. C. Fieller, JRSS B 16 (1954); variances by the jackknife, J. W. Tukey 1958. Differs from it: in nothing.
    """
    x, y, cov = _pseudo_values(over, under)
    n, student = len(over) - 1, _student(len(over) - 2)
    value = _within(x / y, within) if y > 0 else math.nan
    reach = max(_reach(statistic, student) for statistic in (under, *sure))
    if reach >= 1.0:
        return Estimate(value, *within, n, _more(n, reach**1.5))
    low, high = (_within(end, within) for end in _fieller(x, y, student**2 * cov))
    if low > silent[0] or high < silent[1]:
        return Estimate(value, low, high, n)
    return Estimate(value, low, high, n, _more(n, ((high - low) / (silent[1] - silent[0])) ** 2))


def _more(samples: int, times: float) -> int:
    """How many samples are missing, if so many times as many would do."""
    return math.ceil(samples * (min(max(times, 1.2), FARTHEST) - 1.0))


def _pseudo_values(over: Statistic, under: Statistic) -> tuple[float, float, Float[Tensor, "2 2"]]:
    """Both statistics, freed of their bias of order 1/n, and the covariance of the two."""
    both = torch.stack([over, under]).double()
    n = both.shape[1] - 1
    pseudo = n * both[:, :1] - (n - 1) * both[:, 1:]
    x, y = pseudo.mean(1).tolist()
    return x, y, torch.cov(pseudo) / n


def _reach(statistic: Statistic, student: float) -> float:
    """Half the interval of a statistic relative to its value; below 1 it is surely above zero."""
    value, _, cov = _pseudo_values(statistic, statistic)
    return student * math.sqrt(float(cov[0, 0])) / value if value > 0 else math.inf


def _fieller(x: float, y: float, cov: Float[Tensor, "2 2"]) -> tuple[float, float]:
    """Both r with (x − r y)² = cov_xx − 2 r cov_xy + r² cov_yy, for y² > cov_yy."""
    a, b, c = y * y - float(cov[1, 1]), x * y - float(cov[0, 1]), x * x - float(cov[0, 0])
    half = math.sqrt(max(0.0, b * b - a * c))
    return (b - half) / a, (b + half) / a


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def _within(x: float, bounds: tuple[float, float]) -> float:
    return min(max(x, bounds[0]), bounds[1])


def _short(x: float) -> str:
    return "-" if math.isnan(x) else "∞" if x == math.inf else "−∞" if x == -math.inf else f"{x:.3g}".replace("-", "−")
