"""What the newest checkpoint says of the weights: whether they are finite, and were reached by a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from keel.errors import KeelError
from keel.training import checkpoint

LARGEST = 8e9  # bytes of a checkpoint that is read; of a larger one the weights are not looked at


@dataclass(frozen=True)
class Weights:
    """Of one checkpoint.

    Args:
        step: that it was taken after.
        names: of the trained tensors.
        not_finite: names of tensors with NaN or infinity in them.
        untouched: names of tensors whose second moments are all 0: no gradient ever reached them.
    """

    step: int
    names: tuple[str, ...]
    not_finite: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


def newest_weights(folder: Path, say: Callable[[str], None]) -> Weights | None:
    """Of the newest checkpoint; None where there is none that can be read, and why is said."""
    try:
        place = folder / f"step-{checkpoint.newest(folder):08d}" / "tensors.safetensors"
        if place.is_file() and place.stat().st_size > LARGEST:
            say(f"checkpoints: {place.parent.name} is {place.stat().st_size / 1e9:.0f} GB, too large to look at its weights")
            return None
        step, tensors, _ = checkpoint.load(folder)
    except KeelError as refused:
        say(f"checkpoints: {refused}")
        return None
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    second = {name: tensors.get(f"optimizer.{name}.exp_avg_sq") for name in weights}
    return Weights(
        step,
        tuple(weights),
        tuple(name for name, t in weights.items() if not torch.isfinite(t).all()),
        tuple(name for name, moment in second.items() if moment is not None and not moment.any()),
    )
