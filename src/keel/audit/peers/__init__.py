"""Other frameworks' losses, run as they are: TRL, verl and OpenRLHF, in the shape that the exact worlds audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.audit.peers.loss import PeerLoss, loss_and_gradient
from keel.audit.peers.openrlhf import OpenRlhfLoss
from keel.audit.peers.source import installed, version
from keel.audit.peers.trl import TrlLoss
from keel.audit.peers.verl import VerlLoss
from keel.errors import KeelError, nearest

__all__ = ["PEERS", "WRITTEN_FOR", "PeerLoss", "installed", "loss_and_gradient", "peer_loss", "version"]

PEERS: dict[str, type[PeerLoss]] = {"trl": TrlLoss, "verl": VerlLoss, "openrlhf": OpenRlhfLoss}
WRITTEN_FOR = {name: adapter.written_for for name, adapter in PEERS.items()}


def peer_loss(peer: str, configuration: Mapping[str, Any] | None = None) -> PeerLoss:
    """A framework's loss under a configuration, of which only what differs from its defaults is given.

    It goes where an `Objective` goes in `keel.exact.expectation.expect`; `gradient(logp, batch, max_tokens)` runs it on one batch.

    Raises:
        KeelError: an unknown framework or knob. That it is not installed is said when the loss is run.
    """
    if peer not in PEERS:
        raise KeelError(f"No framework is named {peer!r}; {nearest(peer, PEERS)}Expected one of: {', '.join(PEERS)}.")
    return PEERS[peer](dict(configuration or {}))
