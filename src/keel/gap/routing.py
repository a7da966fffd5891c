"""The part of a gap that is routing: how far engine and trainer send tokens to other experts, and what is left with replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Int
from torch import Tensor

from keel.diagnostics.routing import at_predictions, differing_fracs, differs, loads
from keel.models.policy import Policy, TokenLogp
from keel.objectives.kl import k3
from keel.training.step import look
from keel.types import Batch


@dataclass(frozen=True)
class Routed:
    """Where an engine and the trainer send the same tokens.

    Args:
        layers_differ_frac: (token, layer) whose experts differ; tokens_differ_frac: tokens with a difference in any layer.
        k3_share: of the sum of k3 over all tokens, that of the tokens with a difference.
        replayed_k3_nats, replayed_max_abs_nats: of the gap when the trainer goes where the engine went (R3).
        load_max: load of a layer's busiest expert over the mean load; idle_frac: experts to which no token goes.
    """

    layers_differ_frac: float
    tokens_differ_frac: float
    k3_share: float
    replayed_k3_nats: float
    replayed_max_abs_nats: float
    load_max: float
    idle_frac: float


def routed(policy: Policy, batch: Batch, seen: TokenLogp, cuts: Sequence[Int[Tensor, " _"]], temperature: float) -> Routed | None:
    """Measure it; None where there are no experts, or the engine does not tell them.

    Args:
        seen: what the trainer says by itself.
    """
    if seen.experts is None or batch.experts_rollout is None or policy.routing is None:
        return None
    ours, theirs = (at_predictions(experts, batch) for experts in (seen.experts, batch.experts_rollout))
    (layers, _), (tokens, _) = differing_fracs(ours, theirs, batch.mask)
    other = differs(ours, theirs, batch.mask)[0].any(-1)
    size = k3(batch.logp_rollout - seen.logp).double() * batch.mask
    replayed = look(policy, replace(batch, experts=batch.experts_rollout), cuts, temperature).logp
    left = (replayed - batch.logp_rollout)[batch.mask].double()
    load = loads(ours, batch.mask, policy.routing.experts)
    return Routed(
        layers_differ_frac=float(layers),
        tokens_differ_frac=float(tokens),
        k3_share=float(size[other].sum() / size.sum()) if float(size.sum()) > 0 else 0.0,
        replayed_k3_nats=float(k3(-left).mean()),
        replayed_max_abs_nats=float(left.abs().max()),
        load_max=float(load.amax(-1).mean() * policy.routing.experts),
        idle_frac=float((load == 0).double().mean()),
    )
