"""Norms, angles and variances of mean gradients from few samples, without the noise floor, each with its 95 % interval.

The squared norm of a sample mean is the truth plus variance/n: with noisy gradients mostly the latter. Here every product of two
means is taken over pairs of *different* samples (a U-statistic), which leaves no such floor. A statistic is a tensor [1 + n]: its value,
then its values with each sample left out; arithmetic on statistics is arithmetic on these tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def __str__(self) -> str:
        return f"{_short(self.value)} ({_short(self.low)} – {_short(self.high)})"


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


def signed_square(x: Tensor) -> Tensor:
    """x·|x|, of which `ratio(…, root=True)` takes the root again."""
    return x * x.abs()


def ratio(
    over: Statistic,
    under: Statistic,
    *,
    root: bool = False,
    within: tuple[float, float] = (-math.inf, math.inf),
    silent: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """over / under with the interval of all r for which over − r·under is compatible with zero.

    The interval is exact where the two are proportional sample by sample, and has no end where `under` is compatible with zero.

    Args:
        root: give the signed square root of the ratio.
        within: the range of the result.
        silent: an interval that covers all of this says nothing.

    Source: E. C. Fieller, JRSS B 16 (1954); variances by the jackknife, J. W. Tukey 1958. Differs from it: in nothing.
    """
    x, y, cov = _pseudo_values(over, under)
    n, student = len(over) - 1, _student(len(over) - 2)
    value = _within(_root(x / y) if root else x / y, within) if y > 0 else math.nan
    ends = _fieller(x, y, student**2 * cov)
    if ends is None:
        low, high = within
        reach = student * math.sqrt(float(cov[1, 1])) / y if y > 0 else FARTHEST
        return Estimate(value, low, high, n, max(1, math.ceil(n * (min(reach**1.5, FARTHEST) - 1))))
    low, high = (_within(_root(end) if root else end, within) for end in ends)
    if low > silent[0] or high < silent[1]:
        return Estimate(value, low, high, n)
    wide = ((high - low) / (silent[1] - silent[0])) ** 2
    return Estimate(value, low, high, n, max(1, math.ceil(n * (min(max(wide, 1.2), FARTHEST) - 1))))


def _pseudo_values(over: Statistic, under: Statistic) -> tuple[float, float, Float[Tensor, "2 2"]]:
    """Both statistics, freed of their bias of order 1/n, and the covariance of the two."""
    both = torch.stack([over, under]).double()
    n = both.shape[1] - 1
    pseudo = n * both[:, :1] - (n - 1) * both[:, 1:]
    x, y = pseudo.mean(1).tolist()
    return x, y, torch.cov(pseudo) / n


def _fieller(x: float, y: float, cov: Float[Tensor, "2 2"]) -> tuple[float, float] | None:
    """Both r with (x − r y)² = cov_xx − 2 r cov_xy + r² cov_yy; None where `y` is within its own error of zero."""
    a, b, c = y * y - float(cov[1, 1]), x * y - float(cov[0, 1]), x * x - float(cov[0, 0])
    if a <= 0.0 or y <= 0.0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c))
    return (b - half) / a, (b + half) / a


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def _root(x: float) -> float:
    return math.copysign(math.sqrt(abs(x)), x)


def _within(x: float, bounds: tuple[float, float]) -> float:
    return min(max(x, bounds[0]), bounds[1])


def _short(x: float) -> str:
    return "-" if math.isnan(x) else "∞" if x == math.inf else "−∞" if x == -math.inf else f"{x:.3g}"
