"""Memory of log-probabilities for a vocabulary of 49,152: keel's head against full logits, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from player import Channel, Player

VOCABULARY, HIDDEN = 49_152, 576  # SmolLM2-135M
TOKENS = (2_048, 4_096, 8_192)


def full_logits(hidden, weight, token):
    """What one writes first: every logit at once, and a log-softmax of them. No entropy, which would need more."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, token[:, None])[:, 0]


def keel_head(hidden, weight, token):
    """`keel.models.head.token_logp`, which gives the entropy too."""
    import torch

    from keel.models.head import token_logp

    return token_logp(hidden, weight, torch.arange(len(token)), token)[0]


HEADS: dict[str, Callable[..., Any]] = {"full": full_logits, "keel": keel_head}


def play(channel: Channel, head: str, tokens: int) -> None:
    """Forward and backward of one head. The baseline is taken with inputs in place, so the head's own memory is what is told.

    The gradient of the head's weight (108 MiB) is part of it, for each head alike.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    run = HEADS[head]
    small = torch.randn(8, HIDDEN, generator=draw, requires_grad=True)
    run(small, torch.randn(64, HIDDEN, generator=draw, requires_grad=True), torch.arange(8)).sum().backward()
    hidden = torch.randn(tokens, HIDDEN, generator=draw).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=draw) / HIDDEN**0.5).requires_grad_()
    token = torch.randint(0, VOCABULARY, (tokens,), generator=draw)
    channel.baseline()
    channel.ready()
    channel.wait()
    run(hidden, weight, token).sum().backward()
    channel.done(0.0, 0.0, tokens)


def measure(sizes: tuple[int, ...] = TOKENS) -> dict[str, Any]:
    """Peak MB and seconds of each head at each number of tokens, and the ratios to keel's."""
    table: dict[str, Any] = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "tokens": {}}
    for tokens in sizes:
        row: dict[str, float | None] = {}
        for head in HEADS:
            with Player(play, head, tokens) as player:
                step = player.step()
            row[f"{head}_mb"], row[f"{head}_s"] = step.peak_mb, step.seconds
        if row["keel_mb"]:
            row["ratio"] = row["full_mb"] / row["keel_mb"]
        table["tokens"][str(tokens)] = row
    return table
