"""Which truth does a loss follow? The smallest mixture of truths whose gradient is its expected update, or none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.audit.certificate import known_world, mixture, truth_gradient
from keel.exact.expectation import Loss, expect
from keel.exact.world import Setting, World

CANDIDATES = (
    "J", "reverse_kl", "forward_kl", "reverse_kl_positions", "forward_kl_positions", "entropy", "entropy_positions", "length",
    "J_group_std", "arcsine",
)  # fmt: skip
WORLDS: tuple[dict[str, Any], ...] = (
    {"group_size": 4, "prompts": 1},
    {"group_size": 4, "prompts": 1, "max_tokens": 3},
    {"group_size": 4, "prompts": 2, "max_tokens": 1, "vocabulary": 4},
    {"group_size": 4, "prompts": 2, "vocabulary": 2},
)
EXACT = 1e-8  # relative norm of the residual that counts as none


@dataclass(frozen=True)
class Identity:
    """What a loss follows.

    Args:
        terms: coefficient and name of each truth that is ascended; the best single one where nothing is exact; () for no update.
        residual: relative norm of what they leave over.
        cosine: between the update and the nearest single truth's gradient.
        nearest: that truth, signed.
        compared: truth → (cosine, what its best multiple leaves over).
    """

    terms: tuple[tuple[float, str], ...]
    residual: float
    cosine: float
    nearest: str
    compared: Mapping[str, tuple[float, float]]

    @property
    def exact(self) -> bool:
        return self.residual <= EXACT

    def text(self) -> str:
        """One line."""
        if self.exact:
            return " ".join(f"{c:+.4g} {name}" for c, name in self.terms) if self.terms else "nothing: the expected update is zero"
        return f"none of these; nearest is {self.nearest} (cosine {self.cosine:.2f}, {self.residual:.0%} left over)"


def identify(loss: Loss, conditions: Mapping[str, Any] | None = None, seed: int = 0, live_only: bool = False) -> Identity:
    """The smallest mixture of at most three truths, with the same coefficients in every world.

    Args:
        conditions: knobs of the worlds, for instance {"reward": "zero"} to look at a KL term alone.
    """
    worlds = [known_world(Setting.of({"live_only": live_only, **w, **(conditions or {})}), seed + n) for n, w in enumerate(WORLDS)]
    expected = [expect(world, loss) for world in worlds]
    got = torch.cat([e.direction for e in expected])
    if float(got.norm()) <= EXACT * max(1e-300, sum(e.second_moment for e in expected) ** 0.5):
        return Identity((), 0.0, 0.0, "0", {})
    truths = {name: gradient for name in CANDIDATES if (gradient := _stacked(worlds, name)).norm() > 1e-12}
    compared = {name: _against(got, gradient) for name, gradient in truths.items()}
    nearest = min(compared, key=lambda name: compared[name][1])
    cosine, residual = compared[nearest]
    terms, residual = _smallest(truths, got) or (_scaled(truths, [nearest], got), residual)
    return Identity(terms, residual, abs(cosine), nearest if cosine > 0 else f"-{nearest}", compared)


def _smallest(truths: Mapping[str, Tensor], got: Tensor):
    for size in (1, 2, 3):
        for names in itertools.combinations(truths, size):
            coefficients, residual = mixture([truths[name] for name in names], got)
            if residual <= EXACT:
                return tuple(zip(coefficients.tolist(), names, strict=True)), residual
    return None


def _scaled(truths: Mapping[str, Tensor], names: Sequence[str], got: Tensor) -> tuple[tuple[float, str], ...]:
    coefficients, _ = mixture([truths[name] for name in names], got)
    return tuple(zip(coefficients.tolist(), names, strict=True))


def _against(got: Float[Tensor, " D"], truth: Float[Tensor, " D"]) -> tuple[float, float]:
    """Cosine, and what the best multiple of the truth leaves over, relative to the update."""
    cosine = float(got @ truth / (got.norm() * truth.norm()))
    return cosine, max(0.0, 1 - cosine**2) ** 0.5


def _stacked(worlds: Sequence[World], name: str) -> Float[Tensor, " D"]:
    return torch.cat([truth_gradient(world, name) for world in worlds])
