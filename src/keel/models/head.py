"""Log-probabilities and entropy of chosen tokens without ever holding tokens × vocabulary numbers.

The head is cut in chunks of hidden states. The forward pass keeps one number per state (its log-normaliser); the backward pass
makes each chunk's logits again. Where everything fits in one small chunk, its probabilities are kept instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.models.linear import product

CHUNK_NUMBERS = 2**24  # logits held at once: 64 MB in fp32


class _ChunkedHead(torch.autograd.Function):
    """(hidden, weight) → (log-probability of each edge, entropy of each state)."""

    @staticmethod
    def forward(ctx, hidden, weight, state, token, temperature, softcap, kept, chunk):
        edges = _edges_by_chunk(state, hidden.shape[0], chunk)
        logp = hidden.new_empty(state.shape[0])
        entropy = hidden.new_empty(hidden.shape[0])
        normaliser = hidden.new_empty(hidden.shape[0])
        probs = None
        for start, chosen in edges:
            stop = min(start + chunk, hidden.shape[0])
            logits = _logits(hidden[start:stop], weight, temperature, softcap, kept, start)
            normaliser[start:stop] = torch.logsumexp(logits, -1)
            here = normaliser[start:stop]
            logp[chosen] = logits[state[chosen] - start, token[chosen]] - here[state[chosen] - start]
            probs = torch.exp(logits - here[:, None])
            weighted = probs * (logits if kept is None else torch.where(probs > 0, logits, 0.0))
            entropy[start:stop] = here - weighted.sum(-1)
        whole = probs if len(edges) == 1 and softcap is None else None
        ctx.save_for_backward(hidden, weight, state, token, normaliser, entropy, kept, whole)
        ctx.settings = (temperature, softcap, chunk)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, state, token, normaliser, entropy, kept, whole = ctx.saved_tensors
        temperature, softcap, chunk = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        per_state = hidden.new_zeros(hidden.shape[0]).index_add_(0, state, grad_logp)
        with_entropy = bool(grad_entropy.any())
        for start, chosen in _edges_by_chunk(state, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            if whole is None:
                logits = _logits(hidden[start:stop], weight, temperature, softcap, kept, start)
                log_probs = logits - normaliser[start:stop, None]
                probs = log_probs.exp()
            else:
                probs = whole
            grad = probs * -per_state[start:stop, None]
            if with_entropy:
                log_probs = torch.where(probs > 0, probs, 1.0).log()
                grad -= probs * (log_probs + entropy[start:stop, None]) * grad_entropy[start:stop, None]
            grad.index_put_((state[chosen] - start, token[chosen]), grad_logp[chosen], accumulate=True)
            if softcap is not None:
                grad *= 1 - (logits * temperature / softcap).square().nan_to_num(posinf=0.0)
            grad /= temperature
            grad_hidden[start:stop] = product(grad, weight.T)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[start:stop])
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _edges_by_chunk(state: Tensor, states: int, chunk: int) -> list[tuple[int, Tensor | slice]]:
    """For each chunk of states: its start, and the edges that begin in it."""
    if states <= chunk:
        return [(0, slice(None))]
    order = torch.argsort(state, stable=True)
    starts = torch.arange(0, states + chunk, chunk, device=state.device)
    bounds = torch.searchsorted(state[order].contiguous(), starts).tolist()
    return [(i * chunk, order[bounds[i] : bounds[i + 1]]) for i in range((states + chunk - 1) // chunk)]


def _logits(hidden, weight, temperature, softcap, kept, start):
    logits = product(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1.0:
        logits = logits / temperature
    if kept is not None:
        logits = logits.masked_fill(~kept[start : start + hidden.shape[0]], float("-inf"))
    return logits


def token_logp(
    hidden: Float[Tensor, "N d"],
    weight: Float[Tensor, "V d"],
    state: Int[Tensor, " E"],
    token: Int[Tensor, " E"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    kept: Bool[Tensor, "N V"] | None = None,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> tuple[Float[Tensor, " E"], Float[Tensor, " N"]]:
    """Log-probability, in nats, of `token[e]` after `hidden[state[e]]`, and the entropy, in nats, of every state's distribution.

    logp_e = z_e − log Σ_v exp z_v with z = softcap·tanh(h·W / softcap) / temperature, over kept tokens only.

    Args:
        state: which hidden state each edge leaves; several edges may leave one state.
        softcap: of the model's final logits (Gemma); None for none.
        kept: tokens that truncated sampling left; the others have probability 0.
        chunk_numbers: logits held at once. Memory is of this order whatever N·V is.
    """
    chunk = max(1, chunk_numbers // weight.shape[0])
    return _ChunkedHead.apply(hidden, weight, state, token, temperature, softcap, kept, chunk)
