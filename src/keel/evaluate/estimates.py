"""Estimates from counts of right answers: pass@k without bias, and an interval for the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keel.errors import KeelError

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the value is none that these data are compatible with."""
        return not self.low <= value <= self.high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k completions is right, estimated without bias from c right ones of n.

    1 − C(n−c, k)/C(n, k), as a product of factors in [0, 1], so it neither overflows nor cancels. The plug-in estimate
    1 − (1 − c/n)^k is biased downwards.

    Raises:
        KeelError: not 0 ≤ c ≤ n, or not 1 ≤ k ≤ n.

    Source: Codex, arXiv 2107.03374, §2.1. Differs from it: in nothing.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise KeelError(
            f"pass@{k} from {c} right of {n} completions cannot be estimated. Expected 0 ≤ right ≤ completions and 1 ≤ "
            f"k ≤ completions; sample at least k completions of each prompt."
        )
    none_right = 1.0
    for i in range(n - c + 1, n + 1):
        none_right *= max(0.0, 1.0 - k / i)
    return 1.0 - none_right


def interval(counts: Sequence[int], samples: int, z: float = Z95) -> tuple[float, float]:
    """A 95 % interval for the mean pass@1 (avg@samples) over all prompts like these.

    Wilson's score interval, with the number of independent tries read off the spread s² of the prompts' own means:
    mean·(1 − mean)/(s²/P), but at least P (completions of one prompt may tell nothing of other prompts) and at most
    P·samples (no prompt differs from another). With all right or all wrong it is P. No resampling, so no seed.

    Args:
        counts: right answers of each prompt's `samples` completions.

    Returns:
        low, high, in [0, 1].

    Source: E. B. Wilson, JASA 22 (1927). Differs from it: in the number of tries, as said above.
    """
    prompts = len(counts)
    means = [count / samples for count in counts]
    mean = sum(means) / prompts
    spread = mean * (1.0 - mean)
    squares = sum((m - mean) ** 2 for m in means) / max(1, prompts - 1)
    tries: float | int = prompts
    if spread > 0.0:
        tries = prompts * samples if squares == 0.0 else spread * prompts / squares
    tries = min(max(tries, prompts), prompts * samples)
    return wilson(mean, tries, z)


def wilson(mean: float, tries: float | int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a probability of which `tries` independent tries gave this mean.

    Source: E. B. Wilson, JASA 22 (1927). Differs from it: in nothing.
    """
    centre = (mean + z * z / (2 * tries)) / (1 + z * z / tries)
    half = z / (1 + z * z / tries) * math.sqrt(mean * (1 - mean) / tries + z * z / (4 * tries * tries))
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    from scipy.stats import t  # takes its time to import

    return float(t.ppf(0.975, freedom))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, with its t interval: infinite ends for one value, NaN for none. What is no number is left out."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Interval(math.nan, math.nan, math.nan)
    n, mean = len(known), sum(known) / len(known)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t95(n - 1) * math.sqrt(sum((value - mean) ** 2 for value in known) / (n - 1) / n)
    return Interval(mean, mean - half, mean + half)
