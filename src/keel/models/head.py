"""Log-probabilities and entropy of chosen tokens without ever holding tokens × vocabulary numbers.

The vocabulary is cut in blocks, and the softmax is taken over them one after another. The forward pass keeps two numbers per state
(its log-normaliser and its entropy); the backward pass makes each block's logits again, and writes each row of the weight's
gradient once. Blocks are as wide as a budget of numbers allows, so memory does not grow with tokens × vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_NUMBERS = 2**21  # logits of one block: 8 MB in fp32


class _BlockedHead(torch.autograd.Function):
    """(hidden, weight) → (log-probability of each edge, entropy of each state)."""

    @staticmethod
    def forward(ctx, hidden, weight, state, token, temperature, softcap, kept, width):
        normaliser = hidden.new_full((len(hidden),), float("-inf"))
        moment = hidden.new_zeros(len(hidden))  # Σ p z over the blocks so far
        for block in _blocks(weight, width):
            logits = _logits(hidden, weight[block], temperature, softcap, kept, block)
            joined = torch.logaddexp(normaliser, logits.logsumexp(-1))
            shrink = (normaliser - joined).exp().nan_to_num(0.0)  # NaN where nothing was kept so far
            probs = (logits - joined.nan_to_num(neginf=0.0)[:, None]).exp_()
            moment = moment * shrink + probs.mul_(logits if kept is None else logits.masked_fill_(~kept[:, block], 0.0)).sum(-1)
            normaliser = joined
        chosen = (hidden[state] * weight[token]).sum(-1)
        logp = _shape(chosen, temperature, softcap) - normaliser[state]
        entropy = normaliser - moment
        ctx.save_for_backward(hidden, weight, state, token, normaliser, entropy, kept, chosen)
        ctx.settings = (temperature, softcap, width)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, state, token, normaliser, entropy, kept, chosen = ctx.saved_tensors
        temperature, softcap, width = ctx.settings
        per_state = hidden.new_zeros(len(hidden)).index_add_(0, state, grad_logp)
        with_entropy = bool(grad_entropy.any())
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for block in _blocks(weight, width):
            logits = _logits(hidden, weight[block], temperature, softcap, kept, block)
            slope = _slope(logits * temperature, temperature, softcap)
            grad = (logits - normaliser[:, None]).exp_()
            if with_entropy:  # dH/dz = −p (log p + H)
                log_probs = (logits - normaliser[:, None]).clamp_(min=-1e4)
                grad *= -per_state[:, None] - grad_entropy[:, None] * log_probs.add_(entropy[:, None])
            else:
                grad *= -per_state[:, None]
            grad *= slope
            grad_hidden.addmm_(grad, weight[block])
            torch.mm(grad.T, hidden, out=grad_weight[block])
        edge = (grad_logp * _slope(_cap(chosen, softcap), temperature, softcap))[:, None]
        grad_hidden.index_add_(0, state, edge * weight[token])
        grad_weight.index_add_(0, token, edge * hidden[state])
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _blocks(weight: Tensor, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, len(weight))) for start in range(0, len(weight), width))


def _cap(raw: Tensor, softcap: float | None) -> Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def _shape(raw: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Raw products → logits of the distribution that is sampled from."""
    capped = _cap(raw, softcap)
    return capped if temperature == 1.0 else capped / temperature


def _slope(capped: Tensor, temperature: float, softcap: float | None) -> Tensor | float:
    """Derivative of `_shape`, from the capped product."""
    return (
        1 / temperature if softcap is None else (1 - (capped / softcap).square()).nan_to_num(posinf=0.0, neginf=0.0) / temperature
    )


def _logits(hidden, weight, temperature, softcap, kept, block):
    logits = _shape(hidden @ weight.T, temperature, softcap)
    return logits if kept is None else logits.masked_fill_(~kept[:, block], float("-inf"))


def token_logp(
    hidden: Float[Tensor, "N d"],
    weight: Float[Tensor, "V d"],
    state: Int[Tensor, " E"],
    token: Int[Tensor, " E"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    kept: Bool[Tensor, "N V"] | None = None,
    block_numbers: int = BLOCK_NUMBERS,
) -> tuple[Float[Tensor, " E"], Float[Tensor, " N"]]:
    """Log-probability, in nats, of `token[e]` after `hidden[state[e]]`, and the entropy, in nats, of every state's distribution.

    logp_e = z_e − log Σ_v exp z_v with z = softcap·tanh(h·W / softcap) / temperature, over kept tokens only.

    Args:
        state: which hidden state each edge leaves; several edges may leave one state.
        token: must be kept where `kept` is given.
        softcap: of the model's final logits (Gemma); None for none.
        kept: tokens that truncated sampling left; the others have probability 0.
        block_numbers: logits held at once. Memory is of this order whatever N·V is.
    """
    width = max(1, block_numbers // len(hidden))
    return _BlockedHead.apply(hidden, weight, state, token, temperature, softcap, kept, width)
