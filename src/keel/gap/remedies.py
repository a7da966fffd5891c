"""What each correction would do about a measured gap: how many tokens and completions it keeps, caps, and at what weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.objectives.corrections import Correction
from keel.objectives.parts import PARTS
from keel.objectives.signals import TokenView


@dataclass(frozen=True)
class Remedy:
    """One correction on one batch.

    Args:
        name: as in settings: objective.corrections = name.
        kept_frac, kept_completions_frac: of tokens and of completions with any token, those with a weight above 0.
        capped_frac: tokens whose weight the cap holds down.
        weight_mean: over all tokens; 1 is what an unbiased weight has.
    """

    name: str
    kept_frac: float
    kept_completions_frac: float
    capped_frac: float
    weight_mean: float

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@torch.no_grad()
def remedies(gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> list[Remedy]:
    """Every correction with its default bounds. One that looks at advantages is shown the worst case: all of them negative."""
    gap = torch.where(mask, gap.double(), 0.0)
    view = _view(gap, mask)
    return [_remedy(name, make(), view) for name, make in PARTS["corrections"].items()]


def _remedy(name: str, correction: Correction, view: TokenView) -> Remedy:
    mask, completions = view.mask, view.mask.any(1)
    weight = torch.where(mask, correction(view), 0.0)
    kept = weight > 0
    capped = torch.zeros_like(kept)
    if hasattr(correction, "cap"):
        capped = kept & (weight < replace(correction, cap=math.inf)(view))
    return Remedy(
        name=name,
        kept_frac=float(kept.sum() / mask.sum()),
        kept_completions_frac=float(kept.any(1).sum() / completions.sum()),
        capped_frac=float(capped.sum() / mask.sum()),
        weight_mean=float(weight.sum() / mask.sum()),
    )


def _view(gap: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> TokenView:
    zero = torch.zeros_like(gap)
    return TokenView(
        logp=zero,
        log_ratio=zero,
        importance=zero,
        gap=gap,
        ref_log_ratio=None,
        entropy=zero,
        advantage=-mask.to(gap.dtype),
        mask=mask,
    )
