"""What the parts of an objective hand each other: Scored → Prepared (whole batch), and TokenView (what a loss term
sees).

Masked is absent: `keep` replaces whatever stands under a False mask by zero *before* any arithmetic touches it, so that
not even NaN or Inf there changes a bit of a value or of a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def keep(value: Tensor, mask: Bool[Tensor, "..."]) -> Tensor:
    """`value` where True, exactly zero elsewhere; no gradient flows from elsewhere."""
    return torch.where(mask, value, 0.0)


@dataclass(frozen=True)
class Scored:
    """Rewards of one whole batch on their way to advantages.

    Args:
        reward: [B]; 0 where unscorable.
        group: [B] group ids; any integers in any order.
        counted: [B] True where the completion belongs to the baseline and to every other statistic.
        mask: [B, T] True on tokens that will be trained.
    """

    reward: Float[Tensor, " B"]
    group: Int[Tensor, " B"]
    counted: Bool[Tensor, " B"]
    mask: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class Prepared:
    """Whole-batch quantities of one rollout batch, computed before anything is cut into steps or micro-batches.

    Args:
        advantage: [B, T]; 0 where masked.
        mask: [B, T] trained tokens, after shaping and rejection.
        group: [B] group ids.
    """

    advantage: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    group: Int[Tensor, " B"]

    def rows(self, index: Int[Tensor, " b"]) -> Prepared:
        """The same quantities of only these rows, in this order."""
        return Prepared(self.advantage[index], self.mask[index], self.group[index])


@dataclass(frozen=True)
class TokenView:
    """What a loss term sees of each token of a micro-batch; zero where masked.

    Args:
        logp: [B, T] nats, the trainer now; the only field besides `importance`, `ref_log_ratio` and `entropy` that has
            a gradient.
        log_ratio: [B, T] log r = logp − logp_old (staleness), detached.
        importance: [B, T] the objective's own choice of log-ratio; its gradient is that of the token's own logp. 0 at
            advantage 0.
        gap: [B, T] log w = logp_old − logp_rollout, detached.
        ref_log_ratio: [B, T] d = logp − logp_ref, or None without a reference.
        entropy: [B, T] nats.
        advantage: [B, T].
        mask: [B, T].
    """

    logp: Float[Tensor, "B T"]
    log_ratio: Float[Tensor, "B T"]
    importance: Float[Tensor, "B T"]
    gap: Float[Tensor, "B T"]
    ref_log_ratio: Float[Tensor, "B T"] | None
    entropy: Float[Tensor, "B T"]
    advantage: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]

    @property
    def log_rho(self) -> Float[Tensor, "B T"]:
        """log ρ = log w + log r: the trainer now against the sampler."""
        return self.gap + self.log_ratio
