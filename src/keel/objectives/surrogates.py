"""Surrogates: advantage and log-ratio → loss per token [B, T], and where the clip, cap or gate binds.

One formula each, of a `TokenView`; r = exp(importance), and A = advantage. Nothing here averages. A surrogate of your
own is a subclass with a `__call__`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.log_ratios import geometric_mean, own_gradient
from keel.objectives.signals import TokenView


@dataclass(frozen=True)
class Surrogate:
    """Base of all surrogates.

    Args:
        reads_ratio: whether the objective's choice of log-ratio enters at all.
        token_only: whether its formula is about token ratios, so that no other log-ratio may be handed in.
        weighs_gap: whether its weight already holds the engine gap.
    """

    reads_ratio: ClassVar[bool] = True
    token_only: ClassVar[bool] = False
    weighs_gap: ClassVar[bool] = False

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        """Loss per token, in nats times reward."""
        raise NotImplementedError(f"{type(self).__name__} needs a __call__(view) that returns the loss per token.")

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        """Where the clip, cap or gate binds."""
        return torch.zeros_like(view.mask)


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """The plain policy gradient: −A logp. No ratio, no clip.

    Source: REINFORCE, Williams 1992. Differs from it: in nothing.
    """

    reads_ratio: ClassVar[bool] = False

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return -view.advantage * view.logp


@dataclass(frozen=True)
class Unclipped(Surrogate):
    """The importance-weighted policy gradient: −A r.

    Source: conservative policy iteration as in PPO, arXiv 1707.06347, eq. 6. Differs from it: in nothing.
    """

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return -view.advantage * view.importance.exp()


@dataclass(frozen=True)
class Clip(Surrogate):
    """−min(A r, A clip(r, 1 − clip_low, 1 + clip_high)). Past its bound the loss is constant and the gradient zero.

    Args:
        clip_low, clip_high: ε_low in (0, 1], ε_high > 0.

    Source: PPO, arXiv 1707.06347, eq. 7; two ε: DAPO, arXiv 2503.14476, eq. 10. Differs from it: in nothing.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self):
        _refuse_epsilons(self, self.clip_low, self.clip_high)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        bound = self.bound(view)
        ratio = torch.where(bound, 0.0, view.importance).exp()  # an overflow past the bound must not reach the gradient
        return -view.advantage * torch.where(bound, self.limit(view), ratio)

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return _outside(view.importance.detach().exp(), view.advantage, 1 - self.clip_low, 1 + self.clip_high)

    def limit(self, view: TokenView) -> Float[Tensor, "B T"]:
        """The ratio's value past its bound."""
        return _by_sign(view, 1 + self.clip_high, 1 - self.clip_low)


@dataclass(frozen=True)
class DualClip(Clip):
    """Clip, and for A < 0 the loss is at most |A| times `dual`: −max(min(A r, A clip(r)), dual A) where A < 0.

    Args:
        dual: c > 1.

    Source: Ye et al., arXiv 1912.09729, its dual clip. Differs from it: two ε.
    """

    dual: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if not self.dual > 1:
            raise KeelError(f"{self!r}: expected dual > 1; the bound would cut into the ratios that the clip allows. 3 is usual.")

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return super().bound(view) | self._far(view)

    def limit(self, view: TokenView) -> Float[Tensor, "B T"]:
        return super().limit(view).masked_fill(self._far(view), self.dual)

    def _far(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return (view.advantage < 0) & (view.importance.detach().exp() > self.dual)


@dataclass(frozen=True)
class Cispo(Surrogate):
    """−sg(min(r, cap)) A logp: every token keeps a gradient, only its weight is bounded.

    Args:
        cap: the largest weight, an absolute number (5 in ScaleRL and TRL). `Cispo.one_plus(ε)` names the other
            convention, 1 + ε.

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4–5. Differs from it: no lower bound, which the paper too leaves off in
    practice.
    """

    cap: float = 5.0

    def __post_init__(self):
        if not self.cap >= 1:
            raise KeelError(
                f"{self!r}: expected an absolute cap ≥ 1, the weight of an on-policy token. Cispo.one_plus(ε) takes an ε."
            )

    @classmethod
    def one_plus(cls, epsilon: float) -> Cispo:
        """The cap as 1 + ε, the convention of the paper and of most code."""
        return cls(1 + epsilon)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        return -view.importance.detach().exp().clamp(max=self.cap) * view.advantage * view.logp

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return view.importance.detach().exp() > self.cap


@dataclass(frozen=True)
class MiniRL(Surrogate):
    """−M sg(min(ρ, cap)) A logp: the weight is ρ = π/μ, the engine gap included, while the mask M looks at r = π/π_old.

    M is 0 where (A > 0 and r > 1 + clip_high) or (A < 0 and r < 1 − clip_low).

    Source: arXiv 2512.01374, its MiniRL objective. Differs from it: in nothing.
    """

    token_only: ClassVar[bool] = True
    weighs_gap: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.27
    cap: float = 5.0

    def __post_init__(self):
        _refuse_epsilons(self, self.clip_low, self.clip_high)
        if not self.cap >= 1:
            raise KeelError(f"{self!r}: expected cap ≥ 1, the weight of an on-policy token; 5 in the paper.")

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        weight = (view.importance.detach() + view.gap).exp().clamp(max=self.cap)
        return -torch.where(self.bound(view), 0.0, weight) * view.advantage * view.logp

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return _outside(view.importance.detach().exp(), view.advantage, 1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True)
class Gmpo(Surrogate):
    """−A exp(1/|y| Σₛ clipₛ): the geometric mean of the sequence's token ratios, each clipped on its own.

    clipₛ = min(log rₛ, log_clip) where A > 0, max(log rₛ, −log_clip) where A < 0.

    Args:
        log_clip: the bound of |log r|; .4 means ratios in (e^−.4, e^.4).

    Source: GMPO, arXiv 2507.20673, its objective. Differs from it: a token's gradient is that of its own logp, the same
    under the paper's per-completion mean, and right under every other aggregation.
    """

    token_only: ClassVar[bool] = True

    log_clip: float = 0.4

    def __post_init__(self):
        if not self.log_clip > 0:
            raise KeelError(f"{self!r}: expected log_clip > 0, a bound of |log r|; .4 in the paper.")

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        bound = self.bound(view)
        clipped = torch.where(bound, view.advantage.sign() * self.log_clip, view.log_ratio)
        mean = geometric_mean(clipped, view.mask)
        free = own_gradient(mean, torch.where(bound, view.logp.detach(), view.logp))
        return -view.advantage * torch.where(view.advantage == 0, 0.0, free).exp()

    def bound(self, view: TokenView) -> Bool[Tensor, "B T"]:
        return view.log_ratio * view.advantage.sign() > self.log_clip


@dataclass(frozen=True)
class Sapo(Surrogate):
    """−A σ(τ(r − 1)) 4/τ: a soft gate in place of the clip; its gradient weight is 1 at r = 1 and fades on both sides.

    Args:
        tau_positive, tau_negative: sharpness τ where A > 0, and elsewhere.

    Source: SAPO, arXiv 2511.20347, its soft gate. Differs from it: in nothing.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self):
        if not (self.tau_positive > 0 and self.tau_negative > 0):
            raise KeelError(f"{self!r}: expected both temperatures > 0; the paper takes 1.0 and 1.05.")

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        tau = _by_sign(view, self.tau_positive, self.tau_negative)
        ratio = view.importance.clamp(max=20.0).exp()  # the gate's gradient is exactly zero long before
        return -view.advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def _by_sign(view: TokenView, positive: float, otherwise: float) -> Float[Tensor, "B T"]:
    return torch.full_like(view.importance, otherwise).masked_fill(view.advantage > 0, positive)


def _outside(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Bool[Tensor, "B T"]:
    """Where the ratio has already moved past a bound in the direction that the advantage pushes it."""
    return ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))


def _refuse_epsilons(part: Surrogate, low: float, high: float) -> None:
    if not (0 < low <= 1 and high > 0):
        raise KeelError(
            f"{part!r}: expected 0 < clip_low ≤ 1 and clip_high > 0, distances from a ratio of 1. For no clipping at "
            "all take Unclipped() or Reinforce()."
        )
