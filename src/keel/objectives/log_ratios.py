"""Over what a log-ratio is taken: the token, the whole sequence, its geometric mean, or the prefix up to the token.

Each takes per-token log-ratios that are zero where masked and returns a value per token; rows do not mix. Values under
the mask mean nothing. All are linear, hence differentiable; a surrogate replaces their gradient by that of the token's
own log-probability (`own_gradient`), a KL term keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

LogRatio = Callable[[Float[Tensor, "B T"], Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


def token(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Each token's own log-ratio: log rₜ. First-order approximation of the sequence ratio around r = 1.

    Source: PPO, arXiv 1707.06347, eq. 6. Differs from it: in nothing.
    """
    return log_ratio


def sequence(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The log-ratio of the whole completion, at each of its tokens: Σₛ log rₛ. Exact, and of a variance that grows with
    length.

    Source: importance sampling of the completion; J_seq of arXiv 2512.01374. Differs from it: in nothing.
    """
    return log_ratio.sum(1, keepdim=True).expand_as(log_ratio)


def geometric_mean(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean log-ratio of the completion, at each of its tokens: 1/|y| Σₛ log rₛ.

    Source: GSPO, arXiv 2507.18071, eq. 7. Differs from it: in nothing.
    """
    return log_ratio.sum(1, keepdim=True).div(mask.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)


def prefix(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The log-ratio of everything up to and including the token: Σ_{s≤t} log rₛ.

    Source: per-decision importance sampling, Precup, Sutton and Singh 2000. Differs from it: in nothing.
    """
    return log_ratio.cumsum(1)


def own_gradient(value: Float[Tensor, "B T"], logp: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`value` in the forward pass, the gradient of the token's own `logp` in the backward pass.

    With it Σₜ exp(value) A has the gradient Σₜ exp(value) A ∇logpₜ: the policy gradient under that importance weight,
    whatever the weight was taken over and whatever aggregation follows.

    Source: GSPO-token, arXiv 2507.18071, eq. 13. Differs from it: used for every choice of log-ratio.
    """
    return value.detach() + (logp - logp.detach())
