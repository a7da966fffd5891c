"""What to do about the engine gap: a weight per token [B, T] that multiplies the policy loss; w = exp(gap) = π_old/μ.

Truncate (cap the weight), mask (zero it outside an interval), reject (keep or drop whole completions, weight 1). A
rejected token normally stays in the denominators of the step; with `leaves=True` it leaves them, the KL and the entropy
too, as if it had never been sampled. Corrections compose: an objective multiplies all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.log_ratios import geometric_mean, sequence
from keel.objectives.signals import TokenView, keep


@dataclass(frozen=True)
class Correction:
    """Base of all corrections.

    Args:
        weighs: whether the weight estimates π_old/μ, of which an objective takes one; else it only accepts and rejects.
        leaves: whether a token of weight 0 leaves the denominators.
    """

    weighs: ClassVar[bool] = True
    leaves = False  # a field of those that can leave

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        """Weight per token, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} needs a __call__(view) that returns a weight per token.")


@dataclass(frozen=True)
class TruncateToken(Correction):
    """min(w, cap) per token. With an infinite cap the plain behaviour weight.

    Source: TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training". Differs from
    it: in nothing.
    """

    cap: float = 2.0

    def __post_init__(self):
        _refuse_interval(self, 0.0, self.cap)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return view.gap.exp().clamp(max=self.cap)


@dataclass(frozen=True)
class MaskToken(Correction):
    """w where low ≤ w ≤ high, else 0, per token.

    Source: IcePop, arXiv 2510.18855, its masking function. Differs from it: in nothing.
    """

    low: float = 0.5
    high: float = 5.0
    leaves: bool = False

    def __post_init__(self):
        _refuse_interval(self, self.low, self.high)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return _inside(view.gap.exp(), self.low, self.high)


@dataclass(frozen=True)
class TruncateSequence(Correction):
    """min(Πₜ wₜ, cap) at every token of the completion. Unbiased only while the cap does not bind.

    Source: sequence-level TIS, Liu et al. 2025, "When speed kills stability". Differs from it: in nothing.
    """

    cap: float = 2.0

    def __post_init__(self):
        _refuse_interval(self, 0.0, self.cap)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return sequence(view.gap, view.mask).exp().clamp(max=self.cap)


@dataclass(frozen=True)
class MaskSequence(Correction):
    """Πₜ wₜ where low ≤ Πₜ wₜ ≤ high, else 0, at every token of the completion.

    Source: MIS, Liu et al. 2025, "When speed kills stability". Differs from it: a lower bound too, 0 by default.
    """

    low: float = 0.0
    high: float = 2.0
    leaves: bool = False

    def __post_init__(self):
        _refuse_interval(self, self.low, self.high)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return _inside(sequence(view.gap, view.mask).exp(), self.low, self.high)


@dataclass(frozen=True)
class RejectGeometric(Correction):
    """1 where the geometric mean (Πₜ wₜ)^(1/|y|) lies in [low, high], else 0, at every token of the completion.

    Source: geometric-mean rejection, Liu et al. 2025, "When speed kills stability", part 3. Differs from it: in
    nothing.
    """

    weighs: ClassVar[bool] = False

    low: float = 0.999
    high: float = 1.001
    leaves: bool = False

    def __post_init__(self):
        _refuse_interval(self, self.low, self.high)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        mean = geometric_mean(view.gap, view.mask).exp()
        return ((mean >= self.low) & (mean <= self.high)).to(mean.dtype)


@dataclass(frozen=True)
class Veto(Correction):
    """0 at every token of a completion in which any single w < low, else 1: one catastrophic token condemns it.

    Source: token veto, Liu et al. 2025, "When speed kills stability", part 3. Differs from it: in nothing.
    """

    weighs: ClassVar[bool] = False

    low: float = 1e-4
    leaves: bool = False

    def __post_init__(self):
        _refuse_interval(self, self.low, math.inf)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        vetoed = (view.gap < math.log(self.low)).any(1, keepdim=True)
        return (~vetoed).to(view.gap.dtype).expand_as(view.gap)


@dataclass(frozen=True)
class OffPolicyMask(Correction):
    """0 where A < 0 and the completion is off-policy by more than delta nats a token: bad *and* stale teaches nothing.

    Against the sampler: mean(log μ − log π) > δ. Against the trainer at the sampling weights:
    mean(log π_old − log π) > δ. It looks at π now, so it cannot leave denominators counted before the update.

    Args:
        delta: nats per token.
        against_sampler: True takes the engine's log-probabilities, False the trainer's.

    Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 8–9. Differs from it: δ, which the report does not state, is ours.
    """

    weighs: ClassVar[bool] = False

    delta: float = 0.1
    against_sampler: bool = True

    def __post_init__(self):
        if not self.delta > 0:
            raise KeelError(f"{self!r}: expected delta > 0 nats; at 0 half of all on-policy completions would be masked by noise.")

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        behind = -geometric_mean(view.log_rho if self.against_sampler else view.log_ratio, view.mask)
        return (~((view.advantage < 0) & (behind > self.delta))).to(behind.dtype)


def accepted(corrections: tuple[Correction, ...], view: TokenView) -> Bool[Tensor, "B T"]:
    """Tokens that no leaving correction rejects."""
    accept = view.mask
    for correction in corrections:
        if correction.leaves:
            accept = accept & (correction(view) > 0)
    return accept


def weight(corrections: tuple[Correction, ...], view: TokenView) -> Float[Tensor, "B T"]:
    """Product of all corrections: 1 without any, 0 where the token carries no policy gradient anyway."""
    product = torch.ones_like(view.gap)
    for correction in corrections:
        product = product * correction(view)
    return keep(product.detach(), view.advantage != 0)


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _refuse_interval(part: Correction, low: float, high: float) -> None:
    if not (0 <= low <= 1 <= high):
        raise KeelError(f"{part!r}: expected bounds around 1 (0 ≤ low ≤ 1 ≤ high), so that a token without engine gap is kept.")
