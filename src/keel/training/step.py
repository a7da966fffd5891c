"""One optimizer step: model → log-probabilities → objective → gradient → update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.models.policy import Policy, TokenLogp
from keel.models.sharding import whole
from keel.objectives.objective import Objective, Prepared
from keel.types import Batch, StepCounts


@dataclass(frozen=True)
class Gradient:
    """What backward left behind.

    Args:
        loss: of the whole step.
        logp, entropy: [B, T] nats, detached, as the loss saw them.
        experts: [B, L, layers, k] that every token would have gone to by itself; None where there are none.
    """

    loss: float
    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    experts: Int[Tensor, "B L layers k"] | None = None


def accumulate_gradient(
    policy: Policy,
    objective: Objective,
    batch: Batch,
    prepared: Prepared,
    counts: StepCounts,
    cuts: Sequence[Int[Tensor, " _"]],
    temperature: float,
    idle: int = 0,
) -> Gradient:
    """Add the step's gradient to every parameter's `.grad`, one micro-batch after another.

    Each micro-batch gives its share of one sum whose denominators (`counts`) speak of the whole step, so cutting changes nothing.
    Where the batch has `experts`, tokens go to them.

    Args:
        cuts: rows of each micro-batch. Of several ranks each has its own; then what is returned is right in these rows alone.
        idle: passes to take part in besides, since other ranks have more micro-batches and weights that are cut are whole only
            while all compute.
    """
    loss, experts = 0.0, None
    logp = torch.zeros_like(prepared.advantage)
    entropy = torch.zeros_like(prepared.advantage)
    for rows in cuts:
        part, prepared_part = batch.rows(rows), prepared.rows(rows)
        seen = policy.logp(part, temperature=temperature, replay_experts=True)
        share = objective.loss(seen.logp, seen.entropy, part, prepared_part, counts)
        if share.requires_grad:
            share.backward()
        loss += float(share.detach())
        logp[rows], entropy[rows] = seen.logp.detach().to(logp.dtype), seen.entropy.detach().to(logp.dtype)
        if seen.experts is not None:
            experts = seen.experts.new_empty(len(batch), *seen.experts.shape[1:]) if experts is None else experts
            experts[rows] = seen.experts
    stand_by(policy, batch, temperature, idle)
    return Gradient(loss, logp, entropy, experts)


def stand_by(policy: Policy, batch: Batch, temperature: float, passes: int) -> None:
    """Compute the shortest row so many times, for nothing: every gradient gets a zero more."""
    for _ in range(passes):
        shortest = (batch.prompt_len + batch.completion_len).argmin()[None]
        logp = policy.logp(batch.rows(shortest), temperature=temperature, replay_experts=True).logp
        if logp.requires_grad:
            logp.backward(torch.zeros_like(logp))


@torch.no_grad()
def look(policy: Policy, batch: Batch, cuts: Sequence[Int[Tensor, " _"]], temperature: float, idle: int = 0) -> TokenLogp:
    """What the policy says of the rows of a batch that `cuts` name, without gradient, cut as the update will cut it; 0 in others.
    Where the batch has `experts`, tokens go to them.
    """
    logp, entropy = (torch.zeros(batch.mask.shape, dtype=policy.base.dtype, device=batch.mask.device) for _ in range(2))
    experts = None
    for rows in cuts:
        seen = policy.logp(batch.rows(rows), temperature=temperature, replay_experts=True)
        logp[rows], entropy[rows] = seen.logp.to(logp.dtype), seen.entropy.to(logp.dtype)
        if seen.experts is not None:
            experts = seen.experts.new_empty(len(batch), *seen.experts.shape[1:]) if experts is None else experts
            experts[rows] = seen.experts
    stand_by(policy, batch, temperature, idle)
    return TokenLogp(logp, entropy, experts)


def log_probabilities(policy: Policy, batch: Batch, cuts: Sequence[Int[Tensor, " _"]], temperature: float) -> Float[Tensor, "B T"]:
    """Log-probabilities of a whole batch in nats, without gradient, cut as the update will cut it."""
    return look(policy, batch, cuts, temperature).logp


@dataclass(frozen=True)
class Applied:
    """What became of a gradient: its norm before clipping, and the name of the first tensor that was not finite ("" if none)."""

    grad_norm: float
    non_finite: str = ""


def apply_gradient(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Applied:
    """Clip and step. A gradient with a NaN or Inf anywhere changes nothing: no weight, no optimizer state. The norm is that of the
    whole gradient, also where it is cut over ranks.
    """
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(grads))) if grads else 0.0
    if not math.isfinite(norm):
        held = ((name, p.grad) for name, p in parameters.items() if p.grad is not None)
        culprit = next((name for name, grad in held if not whole(grad).isfinite().all()), "the total norm")
        optimizer.zero_grad(set_to_none=True)
        return Applied(norm, culprit)
    if max_grad_norm is not None and norm > max_grad_norm:
        torch._foreach_mul_(grads, max_grad_norm / norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Applied(norm)


def learning_rate(peak: float, schedule: str, warmup: int, update: int, updates: int) -> float:
    """Learning rate of optimizer step `update` (from 0): linear warm-up, then constant, linear to 0, or cosine to 0."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    return peak * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
