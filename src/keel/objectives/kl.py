"""KL to a reference: three estimators of d = logp − logp_ref, over three levels, paid in the reward or in the loss.

In the reward no gradient flows through the estimate, in the loss it does; that changes what is descended. On-policy,
with token losses summed over a constant divisor, the reverse KL's gradient is followed by k1 in the reward, by k2 of
the sequence in the loss, by ρ·k3 in the loss with the prefix ratio, and by k3 in reward and loss together. k1 in the
loss has gradient zero; k3 per token in the loss follows a per-position forward KL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.log_ratios import LogRatio, prefix, sequence
from keel.objectives.signals import TokenView, keep

Estimator = Callable[[Tensor], Tensor]
Level = Callable[[Estimator, Float[Tensor, "B T"], Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


def k1(d: Tensor) -> Tensor:
    """d. Unbiased for KL(π‖π_ref) under samples of π, of either sign.

    Source: Schulman 2020, "Approximating KL divergence". Differs from it: in nothing.
    """
    return d


def k2(d: Tensor) -> Tensor:
    """d²/2. Biased in value; differentiated at π = μ its gradient is the reverse KL's.

    Source: Schulman 2020, "Approximating KL divergence". Differs from it: in nothing.
    """
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    """e^(−d) − 1 + d. Unbiased and never negative; differentiated at π = μ its gradient is the forward KL's.

    Source: Schulman 2020, "Approximating KL divergence". Differs from it: in nothing (expm1 keeps small d exact).
    """
    return (-d).expm1() + d


def k3_clamped(d: Tensor) -> Tensor:
    """k3 clamped to [−10, 10]: its gradient dies exactly where the policy has dropped reference mass.

    Source: a habit of public code (verl). Differs from it: in nothing.
    """
    return k3(d).clamp(-10.0, 10.0)


def per_token(estimator: Estimator, d: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k(dₜ) at each token.

    Source: GRPO, arXiv 2402.03300, eq. 4. Differs from it: in nothing.
    """
    return estimator(d)


def per_prefix(estimator: Estimator, d: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k(Σ_{s≤t} dₛ) at each token: summed over tokens, the KLs of the laws of all prefixes.

    Source: ours. Differs from it: in nothing.
    """
    return estimator(prefix(d, mask))


def per_sequence(estimator: Estimator, d: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k(Σₛ dₛ)/|y| at each token: summed over tokens, the estimate for the whole completion.

    Source: A Comedy of Estimators, arXiv 2512.21852, its sequence level. Differs from it: spread evenly over the
    tokens.
    """
    return estimator(sequence(d, mask)) / mask.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class RewardKL:
    """kl_coef · k(d) taken off the reward, with d = logp_old − logp_ref; no gradient flows through it.

    Args:
        kl_coef: β > 0, reward per nat.
        estimator: k1, k2 or k3.
        level: per_token, per_prefix or per_sequence.
        to_go: each token pays only for itself and what follows (reward-to-go), instead of the completion's whole sum.
        after_normalising: taken off the finished advantage, so that no standard deviation can blow up its noise.

    Source: whole sum: RLOO, arXiv 2402.14740; to go: REINFORCE++, arXiv 2501.03262. Differs from it: both are options.
    """

    kl_coef: float = 0.05
    estimator: Estimator = k1
    level: Level = per_token
    to_go: bool = False
    after_normalising: bool = False

    def __post_init__(self):
        _refuse_coefficient(self)

    def penalty(self, d: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]:
        """What each token's return loses, and what the completion's reward loses."""
        paid = self.kl_coef * keep(self.level(self.estimator, d, mask), mask)
        whole = paid.sum(1)
        return paid.flip(1).cumsum(1).flip(1) if self.to_go else whole[:, None].expand_as(paid), whole


@dataclass(frozen=True)
class LossKL:
    """kl_coef · ρ · k(d) added to the loss of each token and differentiated.

    Args:
        kl_coef: β > 0.
        estimator: k1, k2 or k3.
        level: per_token, per_prefix or per_sequence.
        ratio: over what the importance ratio ρ = π/μ that multiplies the estimate is taken, or None for no ratio.

    Source: GRPO, arXiv 2402.03300, eq. 3; with ratio: DeepSeek-V3.2, arXiv 2512.02556, eq. 7. Differs from it: ratio
    over prefixes too.
    """

    kl_coef: float = 0.04
    estimator: Estimator = k3
    level: Level = per_token
    ratio: LogRatio | None = None

    def __post_init__(self):
        _refuse_coefficient(self)

    def __call__(self, view: TokenView) -> Float[Tensor, "B T"]:
        """Loss per token."""
        estimate = self.level(self.estimator, view.ref_log_ratio, view.mask)
        if self.ratio is not None:
            log_rho = view.log_rho + (view.logp - view.logp.detach())
            estimate = estimate * self.ratio(log_rho, view.mask).exp()
        return self.kl_coef * estimate


def _refuse_coefficient(part: RewardKL | LossKL) -> None:
    if not 0 < part.kl_coef < float("inf"):
        raise KeelError(
            f"{part!r}: expected a finite kl_coef > 0. A penalty that is off is written None, so that no reference is loaded."
        )
