"""The distribution that tokens are drawn from, and the draw. Pure: uniforms come in, tokens go out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.types import Sampling


def kept_tokens(log_probs: Float[Tensor, "U V"], sampling: Sampling) -> Bool[Tensor, "U V"]:
    """Tokens that top-k, top-p and min-p leave, each read off the tempered distribution; the likeliest token always stays.

    top-p keeps the shortest head of the sorted distribution whose mass reaches p; ties are kept in token order.
    """
    kept = torch.ones_like(log_probs, dtype=torch.bool)
    if sampling.top_k > 0:
        kth = log_probs.topk(min(sampling.top_k, log_probs.shape[-1]), -1).values[:, -1:]
        kept &= log_probs >= kth
    if sampling.min_p > 0:
        kept &= log_probs >= log_probs.max(-1, keepdim=True).values + np.log(sampling.min_p)
    if sampling.top_p < 1.0:
        ordered, index = log_probs.masked_fill(~kept, float("-inf")).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept &= torch.zeros_like(kept).scatter(-1, index, before < sampling.top_p)
    return kept


def distribution(logits: Float[Tensor, "U V"], sampling: Sampling) -> tuple[Float[Tensor, "U V"], Bool[Tensor, "U V"] | None]:
    """Log-probabilities, in nats, that tokens are drawn from, and the kept set (None when nothing is cut off).

    Temperature 0 is greedy: all mass on the likeliest token.
    """
    if sampling.temperature == 0.0:
        best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
        return torch.zeros_like(logits).masked_fill(~best, float("-inf")), None
    log_probs = (logits if sampling.temperature == 1.0 else logits / sampling.temperature).log_softmax(-1)
    if not sampling.truncated:
        return log_probs, None
    kept = kept_tokens(log_probs, sampling)
    return log_probs.masked_fill(~kept, float("-inf")).log_softmax(-1), kept


def draw(log_probs: Float[Tensor, "U V"], row: Int[Tensor, " R"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """One token per row by inverting the cumulative distribution of `log_probs[row]` at `uniform`.

    The same uniform gives the same token whatever else is in the batch, unless it lies within rounding of a boundary.
    """
    mass = log_probs.exp().double().cumsum(-1)
    mass = mass if torch.equal(row, torch.arange(len(mass), device=row.device)) else mass[row]
    total = mass[:, -1]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))  # rounding never passes the last token
    return torch.searchsorted(mass, target[:, None], right=True)[:, 0]


def uniforms(keys: Sequence[tuple[int, ...]], count: int) -> Float[Tensor, "R count"]:
    """`count` uniforms in [0, 1) per key. A row's numbers depend on its own key alone, never on its neighbours."""
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(count) for key in keys]))
