"""Advantages: a baseline, then a scale. Rewards [B], group ids [B], counted [B] → advantages [B, T].

Groups are formed by id, never by position, and may differ in size; completions that do not count drop out of every
statistic. A group whose rewards are all equal (a group of one included) has exactly zero advantage, in any precision:
equality is seen in the rewards' extremes, not in a rounded standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.signals import Scored, keep

Baseline = Callable[[Scored], Float[Tensor, " B"]]
Scale = Callable[[Float[Tensor, "B T"], Float[Tensor, " B"], Scored], Float[Tensor, "B T"]]


@dataclass(frozen=True)
class Advantage:
    """Aₜ = scale(returnₜ − baseline).

    Args:
        baseline: Scored → [B]; what is subtracted from every return of the completion.
        scale: (advantage [B, T], centred reward [B], Scored) → [B, T]; what the result is divided by.
    """

    baseline: Baseline
    scale: Scale

    def __call__(self, returns: Float[Tensor, "B T"], scored: Scored) -> Float[Tensor, "B T"]:
        """Advantage per token; `returns` differ within a completion only when a KL penalty is paid as reward-to-go."""
        baseline = self.baseline(scored)
        centred = keep(scored.reward - baseline, scored.counted)
        advantage = keep(returns - baseline[:, None], scored.mask)
        return keep(self.scale(advantage, centred, scored), scored.mask)


# ── baselines ──────────────────────────────────────────────────────────────────────────────────────────────────────


def group_mean(scored: Scored) -> Float[Tensor, " B"]:
    """Mean reward of the completion's group, itself included: b = 1/G Σⱼ Rⱼ. The gradient is (G−1)/G of the true one.

    Source: GRPO, arXiv 2402.03300, §4.1.2. Differs from it: in nothing.
    """
    total, count, equal = _group_statistics(scored)
    return torch.where(equal, scored.reward, total / count.clamp(min=1))


def sibling_mean(scored: Scored) -> Float[Tensor, " B"]:
    """Mean reward of the *other* completions of the group: bᵢ = 1/(G−1) Σ_{j≠i} Rⱼ. Unbiased.

    Alone in its group a completion gets its own reward, hence no advantage.

    Source: RLOO, arXiv 2402.14740, its estimator. Differs from it: in nothing.
    """
    total, count, equal = _group_statistics(scored)
    return torch.where(equal, scored.reward, (total - scored.reward) / (count - 1).clamp(min=1))


def batch_mean(scored: Scored) -> Float[Tensor, " B"]:
    """Mean reward of the whole batch, every prompt together: b = 1/B Σⱼ Rⱼ.

    Source: Tricks or Traps, arXiv 2508.08221, its batch-level mean. Differs from it: in nothing.
    """
    return group_mean(_one_group(scored))


def zero(scored: Scored) -> Float[Tensor, " B"]:
    """No baseline: b = 0. Unbiased, of the largest variance.

    Source: REINFORCE, Williams 1992. Differs from it: in nothing.
    """
    return torch.zeros_like(scored.reward)


# ── scales ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def unscaled(advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
    """The advantage as it is: every prompt keeps its weight.

    Source: Dr. GRPO, arXiv 2503.20783, §3.2. Differs from it: in nothing.
    """
    return advantage


@dataclass(frozen=True)
class _Std:
    """A division by (std + eps).

    Args:
        ddof: 0 divides the sum of squares by n, 1 by n − 1.
        eps: added to the standard deviation.
    """

    ddof: int = 1
    eps: float = 1e-4

    def __post_init__(self):
        if self.ddof not in (0, 1) or self.eps < 0:
            raise KeelError(f"{self!r}: expected ddof 0 or 1 and eps ≥ 0. ddof 1 is torch.std's habit, 0 the population's.")

    def _divide(self, advantage: Tensor, deviation: Tensor, scored: Scored) -> Tensor:
        total, count, _ = _group_statistics(scored, keep(deviation.square(), scored.counted))
        std = (total / (count - self.ddof).clamp(min=1)).sqrt() + self.eps
        return torch.where(advantage == 0, advantage, advantage / torch.where(std > 0, std, 1.0)[:, None])


@dataclass(frozen=True)
class GroupStd(_Std):
    """Divide by the standard deviation of the group's rewards: A / (std_group(R) + eps).

    Reweights prompts by about 1/√(p(1−p)), capped at √(G−1): easy and hard prompts weigh more than those in the middle.

    Source: GRPO, arXiv 2402.03300, §4.1.2. Differs from it: ddof and eps, which the paper leaves open, are named.
    """

    def __call__(self, advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
        return self._divide(advantage, scored.reward - group_mean(scored), scored)


@dataclass(frozen=True)
class RawBatchStd(_Std):
    """Divide by the standard deviation of the raw rewards of the whole batch: A / (std_batch(R) + eps). A scale only.

    Source: Lite PPO, arXiv 2508.08221. Differs from it: ddof and eps are named.
    """

    def __call__(self, advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
        return self._divide(advantage, scored.reward - batch_mean(scored), _one_group(scored))


@dataclass(frozen=True)
class CentredBatchStd(_Std):
    """Divide by the standard deviation over the batch of the *centred* rewards, each completion once: A / (std_batch(R
    − b) + eps).

    Nothing is subtracted, so a group without signal stays at exactly zero: REINFORCE++-baseline without its trap.

    Source: ours, after REINFORCE++-baseline, arXiv 2501.03262. Differs from it: weighs by completion and does not
    shift.
    """

    def __call__(self, advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
        whole = _one_group(scored)
        deviation = centred - group_mean(Scored(centred, whole.group, whole.counted, whole.mask))
        return self._divide(advantage, deviation, whole)


@dataclass(frozen=True)
class TokenWhitening:
    """Whiten over all trained tokens of the batch: (A − mean_tokens(A)) / √(var_tokens(A) + eps).

    The mean weighs by token, so after a group baseline it is not zero: a group that is wrong throughout can get a
    positive advantage.

    Source: REINFORCE++, arXiv 2501.03262, its global advantage normalisation. Differs from it: in nothing (population
    variance).
    """

    eps: float = 1e-8

    def __call__(self, advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
        mean, std = _token_moments(advantage, scored.mask, self.eps)
        return (advantage - mean) / std


@dataclass(frozen=True)
class TokenStd:
    """Divide by the standard deviation over all trained tokens, without the shift: A / √(var_tokens(A) + eps).

    Source: ours, after REINFORCE++, arXiv 2501.03262. Differs from it: subtracts no mean, so its sign is the centred
    reward's.
    """

    eps: float = 1e-8

    def __call__(self, advantage: Float[Tensor, "B T"], centred: Float[Tensor, " B"], scored: Scored) -> Float[Tensor, "B T"]:
        _, std = _token_moments(advantage, scored.mask, self.eps)
        return torch.where(advantage == 0, advantage, advantage / std)


# ── statistics ─────────────────────────────────────────────────────────────────────────────────────────────────────


def over_group(value: Float[Tensor, " B"], scored: Scored, reduce: str) -> Float[Tensor, " B"]:
    """The "sum", "amax" or "amin" of the counted values of each completion's group, at every completion."""
    neutral = {"sum": 0.0, "amax": float("-inf"), "amin": float("inf")}[reduce]
    _, index = scored.group.unique(return_inverse=True)
    counted = torch.where(scored.counted, value, neutral)
    return torch.full_like(value, neutral).scatter_reduce(0, index, counted, reduce)[index]


def _group_statistics(scored: Scored, value: Tensor | None = None) -> tuple[Tensor, Tensor, Bool[Tensor, " B"]]:
    """Per group: sum of `value` (by default the reward), number of counted ones, and whether these are all equal."""
    value = scored.reward if value is None else value
    count = over_group(torch.ones_like(value), scored, "sum")
    equal = over_group(value, scored, "amax") == over_group(value, scored, "amin")
    return over_group(value, scored, "sum"), count, equal & scored.counted


def _one_group(scored: Scored) -> Scored:
    return Scored(scored.reward, torch.zeros_like(scored.group), scored.counted, scored.mask)


def _token_moments(advantage: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and √(variance + eps) over trained tokens; the mean of equal values is exactly that value."""
    count = mask.sum().clamp(min=1)
    high = torch.where(mask, advantage, float("-inf")).amax()
    low = torch.where(mask, advantage, float("inf")).amin()
    mean = torch.where(high == low, high, keep(advantage, mask).sum() / count)
    variance = keep((advantage - mean).square(), mask).sum() / count
    return mean, (variance + eps).sqrt()


# ── the usual pairs ────────────────────────────────────────────────────────────────────────────────────────────────

centred = Advantage(group_mean, unscaled)
leave_one_out = Advantage(sibling_mean, unscaled)
group_normalised = Advantage(group_mean, GroupStd())
none = Advantage(zero, unscaled)
