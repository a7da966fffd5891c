"""Where a mixture's tokens go: how far engine and trainer agree, and how evenly the experts are used.

The log-probability of a completion's token is computed at the token before it, so that one's experts are looked at. Pure; −1 is
unknown and counts in nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.types import Batch

Pair = tuple[Float[Tensor, ""], Int[Tensor, ""]]  # a value, and of how many it speaks


def at_predictions(experts: Int[Tensor, "B L layers k"], batch: Batch) -> Int[Tensor, "B T layers k"]:
    """Experts of the token that each completion token was predicted from."""
    t = torch.arange(batch.mask.shape[1], device=experts.device)
    column = (batch.prompt_len[:, None] + t - 1).clamp(max=experts.shape[1] - 1)
    return experts[torch.arange(len(batch), device=experts.device)[:, None], column]


def differs(
    ours: Int[Tensor, "B T layers k"], theirs: Int[Tensor, "B T layers k"], where: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "B T layers"], Bool[Tensor, "B T"]]:
    """Whether a token's set of experts differs, by layer; and which of the tokens `where` are known on both sides."""
    known = where & (ours >= 0).all(-1).all(-1) & (theirs >= 0).all(-1).all(-1)
    other = (ours.sort(-1).values != theirs.sort(-1).values).any(-1)
    return other & known[..., None], known


def differing_fracs(
    ours: Int[Tensor, "B T layers k"], theirs: Int[Tensor, "B T layers k"], where: Bool[Tensor, "B T"]
) -> tuple[Pair, Pair]:
    """Share of (token, layer) whose experts differ, and share of tokens with a difference in any layer."""
    other, known = differs(ours, theirs, where)
    count = known.sum()
    return (other.sum().double() / (count * other.shape[-1]), count), (other.any(-1).sum().double() / count, count)


def loads(experts: Int[Tensor, "B T layers k"], where: Bool[Tensor, "B T"], number: int) -> Float[Tensor, "layers experts"]:
    """Share of each layer's choices that each of its `number` experts got; rows sum to 1."""
    chosen = experts[where & (experts >= 0).all(-1).all(-1)].long()
    layers = experts.shape[2]
    index = chosen + number * torch.arange(layers, device=experts.device)[:, None]
    count = torch.bincount(index.flatten(), minlength=layers * number).view(layers, number).double()
    return count / count.sum(-1, keepdim=True)
