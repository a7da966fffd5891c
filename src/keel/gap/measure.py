"""How far the engine is from the trainer, on completions that the engine sampled: sizes, tails, and whether it is bias or noise.

gap = logp_old − logp_rollout in nats, w = exp(gap) = π_old/μ. Since every token was drawn from μ, two expectations are known
whatever the gap is: E[w] = 1 where both spread over the same tokens, and E[gap] = −KL(μ‖π_old). So a mean of w away from 1 is a
bias that no rounding makes, and a mean gap below 0 by about k3 is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.diagnostics.gap import OUTSIDE, chi_square, ess_frac, outside_frac, pearson, sequence_log_weight
from keel.evaluate.estimates import Interval, t95
from keel.objectives.kl import k3

PROBABILITIES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
ENTROPIES = (0.0, 0.01, 0.1, 0.5, 1.0, math.inf)  # nats


@dataclass(frozen=True)
class Bin:
    """The gap of some of the tokens.

    Args:
        where: which tokens.
        share: of all tokens.
        mean_nats, k3_nats, max_abs_nats: of their gap.
        k3_share: of the sum of k3 over all tokens.
    """

    where: str
    share: float
    mean_nats: float
    k3_nats: float
    max_abs_nats: float
    k3_share: float


@dataclass(frozen=True)
class Gap:
    """What can be said of a gap from log-probabilities alone.

    Args:
        tokens, completions: that it was measured on.
        k1_nats: mean of −gap, unbiased for KL(μ‖π_old) and of either sign.
        k3_nats: mean of w − 1 − gap, unbiased for the same and never negative.
        chi2: mean of (w − 1)².
        max_abs_nats: largest |gap|.
        outside_frac, above_frac: tokens with w outside [.9, 1.1], and above it.
        pearson: correlation of the two probabilities over tokens.
        ess_frac, sequence_ess_frac: effective share of tokens under w, of completions under Πw.
        sequence_min_nats, sequence_max_nats: smallest and largest log Πw of a completion.
        gap: mean gap, in nats.
        weight: mean of w.
        positive: share of gaps above 0 among those that are not 0; symmetric noise is at .5.
        explained_frac: share of the gap's variance that the token's probability (in ten classes) explains; noise: about 0.
        bins: by "position", "probability", "entropy".
    """

    tokens: int
    completions: int
    k1_nats: float
    k3_nats: float
    chi2: float
    max_abs_nats: float
    outside_frac: float
    above_frac: float
    pearson: float
    ess_frac: float
    sequence_ess_frac: float
    sequence_min_nats: float
    sequence_max_nats: float
    gap: Interval
    weight: Interval
    positive: Interval
    explained_frac: float
    bins: dict[str, tuple[Bin, ...]]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@torch.no_grad()
def measure(
    logp_old: Float[Tensor, "B T"],
    logp_rollout: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    entropy: Float[Tensor, "B T"] | None = None,
    cluster: Int[Tensor, " B"] | None = None,
) -> Gap:
    """Measure a gap.

    Args:
        logp_old, logp_rollout: nats; anything where masked.
        mask: at least one token.
        entropy: nats, of the trainer's distribution; without it there are no bins by entropy.
        cluster: completions of one number (of one prompt) are not independent of each other, and intervals allow for it; each is
            on its own unless given.
    """
    gap = torch.where(mask, logp_old.double() - logp_rollout.double(), 0.0)
    cluster = torch.arange(len(mask)) if cluster is None else cluster
    whole = sequence_log_weight(gap, mask)
    flat, sign = gap[mask], gap.sign()
    return Gap(
        tokens=int(mask.sum()),
        completions=int(mask.any(1).sum()),
        k1_nats=float(-flat.mean()),
        k3_nats=float(k3(-flat).mean()),
        chi2=float(chi_square(gap, mask)),
        max_abs_nats=float(flat.abs().max()),
        outside_frac=float(outside_frac(gap, mask)),
        above_frac=float((flat > math.log(OUTSIDE[1])).double().mean()),
        pearson=float(pearson(logp_old, logp_rollout, mask)[0]),
        ess_frac=float(ess_frac(gap, mask)),
        sequence_ess_frac=float(ess_frac(whole, mask.any(1))),
        sequence_min_nats=float(whole[mask.any(1)].min()),
        sequence_max_nats=float(whole[mask.any(1)].max()),
        gap=clustered_mean(gap, mask, cluster),
        weight=clustered_mean(gap.exp(), mask, cluster),
        positive=clustered_mean((sign + 1) / 2, mask & (sign != 0), cluster),
        explained_frac=explained_frac(flat, logp_rollout[mask].double().exp()),
        bins=_bins(gap, logp_rollout, mask, entropy),
    )


def clustered_mean(value: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], cluster: Int[Tensor, " B"]) -> Interval:
    """Mean over tokens with a 95 % t interval in which whole clusters of rows, and not tokens, are independent.

    The standard error is that of a ratio of two sums over clusters (linearised). One cluster has no interval: −∞ to ∞.
    """
    _, index = cluster.unique(return_inverse=True)
    clusters = int(index.max()) + 1
    count = int(mask.sum())
    if count == 0:
        return Interval(math.nan, -math.inf, math.inf)
    mean = float(value[mask].mean())
    residual = torch.where(mask, value - mean, 0.0).sum(1)
    sums = residual.new_zeros(clusters).index_add(0, index, residual)
    if clusters == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t95(clusters - 1) * math.sqrt(clusters / (clusters - 1) * float(sums.square().sum())) / count
    return Interval(mean, mean - half, mean + half)


def explained_frac(gap: Float[Tensor, " N"], probability: Float[Tensor, " N"], classes: int = 10) -> float:
    """Share of the gap's variance between classes of equal size by probability, less what chance alone would give; at least 0."""
    classes = min(classes, len(gap) // 10)
    spread = float(gap.var(correction=0)) if len(gap) else 0.0
    if classes < 2 or spread == 0.0:
        return 0.0
    parts = gap[probability.argsort(stable=True)].tensor_split(classes)
    between = sum(len(part) * float(part.mean() - gap.mean()) ** 2 for part in parts) / len(gap) / spread
    chance = (classes - 1) / (len(gap) - 1)
    return max(0.0, (between - chance) / (1 - chance))


def _bins(gap: Tensor, logp_rollout: Tensor, mask: Tensor, entropy: Tensor | None) -> dict[str, tuple[Bin, ...]]:
    flat = gap[mask]
    position = torch.arange(mask.shape[1]).expand(mask.shape)[mask]
    last = torch.zeros_like(mask).scatter(1, (mask.cumsum(1)).argmax(1, keepdim=True), True)[mask]
    told = {
        "position": [*_by_position(position), ("last", last)],
        "probability": list(_between(logp_rollout[mask].double().exp().clamp(max=1.0), PROBABILITIES)),
    }
    if entropy is not None:
        told["entropy"] = list(_between(entropy[mask].double(), ENTROPIES))
    total = max(float(k3(-flat).sum()), 1e-300)
    return {
        kind: tuple(_bin(where, flat[chosen], len(flat), total) for where, chosen in classes if bool(chosen.any()))
        for kind, classes in told.items()
    }


def _bin(where: str, gap: Tensor, tokens: int, total: float) -> Bin:
    each = k3(-gap)
    share = len(gap) / tokens
    return Bin(where, share, float(gap.mean()), float(each.mean()), float(gap.abs().max()), float(each.sum()) / total)


def _by_position(position: Int[Tensor, " N"]) -> Iterator[tuple[str, Bool[Tensor, " N"]]]:
    """Tokens 1, 2, 3–4, 5–8, 9–16 …"""
    low, high = 0, 1
    while low <= int(position.max()):
        yield (str(high) if high - low == 1 else f"{low + 1}–{high}"), (position >= low) & (position < high)
        low, high = high, 2 * high


def _between(value: Float[Tensor, " N"], edges: Sequence[float]) -> Iterator[tuple[str, Bool[Tensor, " N"]]]:
    for low, high in pairwise(edges):
        first = low == edges[0]
        name = f"≥ {low:g}" if math.isinf(high) else f"{low:g}–{high:g}"
        yield name, ((value >= low) if first else (value > low)) & (value <= high)
