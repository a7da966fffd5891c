"""Bytes that a step moves between machines, and seconds that they take: closed forms."""

from __future__ import annotations

from dataclasses import dataclass

TOKEN_BYTES = 8 + 4 + 8 + 1  # of a sampled token on its way to the trainer: id, log-probability, version, whether it was sampled


@dataclass(frozen=True)
class Traffic:
    """Bytes of one optimizer step.

    Args:
        weights: out of the trainer's machine, once for each version.
        weights_in: into all machines with rollout workers together.
        rollouts: from workers to the trainer.
        gradients: out of each trainer, and as many into it.
    """

    weights: float
    weights_in: float
    rollouts: float
    gradients: float


def traffic(
    parameters: float,
    tokens: float,
    machines: int,
    trainers: int,
    *,
    weight_bytes: int = 2,
    gradient_bytes: int = 4,
    updates: int = 1,
) -> Traffic:
    """Bytes of a step.

    Args:
        parameters: of the model.
        tokens: sampled ones of a step.
        machines: with rollout workers; those on one machine share what it has fetched.
        trainers: among which gradients are summed: each sends and receives 2 (M − 1) / M of them (a ring).
        weight_bytes, gradient_bytes: of one parameter.
        updates: optimizer steps between syncs.

    Source: the ring all-reduce of Patarasu and Yuan, 2009 (doi 10.1016/j.jpdc.2008.09.002).
    """
    sent = parameters * weight_bytes / updates
    return Traffic(sent, sent * machines, tokens * TOKEN_BYTES, 2 * (trainers - 1) / trainers * parameters * gradient_bytes)


def broadcast_s(size: float, machines: int, link: float) -> float:
    """Seconds until all machines have what one sends, when those that have it pass it on: a tree, whole objects at a time.

    Args:
        size: bytes.
        link: bytes per second, into and out of a machine.
    """
    return size / link * machines.bit_length() if machines else 0.0
