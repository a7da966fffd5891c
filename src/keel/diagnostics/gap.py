"""The engine gap in single numbers: gap = logp_old − logp_rollout, w = exp(gap) = π_old/μ, on completions that μ sampled.

Pure; every function takes [B, T] and a mask, and gives a number without dimensions. What stands under a False mask changes nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.objectives.signals import keep

OUTSIDE = (0.9, 1.1)  # ratios beyond are the tails


def chi_square(gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean of (w − 1)²: χ²(π_old‖μ) of one token's distribution, the variance that weighing by w costs."""
    return keep(torch.expm1(gap.double()).square(), mask).sum() / mask.sum()


def outside_frac(gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Share of tokens with w outside [.9, 1.1]; a NaN is outside."""
    ratio = gap.double().exp()
    return (mask & ~((ratio >= OUTSIDE[0]) & (ratio <= OUTSIDE[1]))).sum().double() / mask.sum()


def pearson(
    logp_old: Float[Tensor, "B T"], logp_rollout: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Correlation over tokens of the trainer's with the engine's probability, and of how many: 0 where either never varies."""
    count = mask.sum()
    a, b = (keep(logp.double().exp(), mask) for logp in (logp_old, logp_rollout))
    a, b = (keep(p - p.sum() / count, mask) for p in (a, b))
    spread = (a.square().sum() * b.square().sum()).sqrt()
    return (a * b).sum() / spread, count * (spread != 0)


def ess_frac(log_weight: Float[Tensor, "*N"], where: Bool[Tensor, "*N"]) -> Float[Tensor, ""]:
    """Effective share of samples under these log-weights: (Σw)² / (N Σw²). 1 when all weights are equal."""
    log_weight = torch.where(where, log_weight.double(), float("-inf")).flatten()
    twice = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)
    return twice.exp() / where.sum()


def sequence_log_weight(gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """log Πw of every completion; 0 for one without a token."""
    return keep(gap.double(), mask).sum(1)
