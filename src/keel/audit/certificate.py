"""Claims judged: each in several random worlds, the worst of which is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError, nearest
from keel.exact.expectation import Loss, expect
from keel.exact.truths import gradient, numeric_gradient, parse
from keel.exact.world import Setting, World
from keel.objectives.registry import Recipe
from keel.types import Claim

VARIATIONS: tuple[dict[str, Any], ...] = (
    {"group_size": 2},
    {"policy": "shared", "group_size": 3, "vocabulary": 2},
    {"max_tokens": 3, "prompts": 1, "group_size": 3},
    {"policy": "shared", "prompts": 1, "group_size": 4},
)  # the random worlds of a claim, as far as its conditions leave open

FACTORS = {
    "(G-1)/G": lambda world: (world.group_size - 1) / world.group_size,
    "(B-1)/B": lambda world: 1 - 1 / (world.group_size * world.prompts),
    "TPR-FPR": lambda world: world.tpr - world.fpr,
}

NUMERIC = 1e-6  # how far autograd's truths may be from finite differences, relative


@dataclass(frozen=True)
class Measured:
    """One claim in one world.

    Args:
        relative_bias: norm of what is left over against the truth, relative to the truth (of "zero": to the gradient's root mean
            square; of "scaled" without a factor, "mixture" and "biased": after the best coefficients).
        cosine: between the expected update and the truth's gradient; NaN where either is zero.
        scale: the best multiple of the truth.
        variance: trace of the covariance of one batch's gradient.
        signal_to_noise: of one batch.
        numeric: relative distance of the truth's gradient from finite differences.
        setting: the world.
    """

    relative_bias: float
    cosine: float
    scale: float
    variance: float
    signal_to_noise: float
    numeric: float
    setting: Setting


@dataclass(frozen=True)
class Certificate:
    """A claim with its verdict.

    Args:
        objective: whose claim it is.
        worst: the world with the largest bias: the least favourable one, and for "biased" the counterexample.
        holds: whether it is true, and the truths agree with finite differences.
        worlds: how many there were.
    """

    objective: str
    claim: Claim
    worst: Measured
    holds: bool
    worlds: int

    def as_json(self) -> dict[str, Any]:
        """The stable record of `keel audit --json`."""
        return {
            "objective": self.objective,
            "claim": f"{self.claim.says} by {self.claim.factor}" if self.claim.factor else self.claim.says,
            "truth": self.claim.truth,
            "conditions": dict(self.claim.conditions),
            "relative_bias": self.worst.relative_bias,
            "cosine": None if math.isnan(self.worst.cosine) else self.worst.cosine,
            "variance": self.worst.variance,
            "holds": self.holds,
        }


def certify(recipe: Recipe, knobs: Mapping[str, Any] | None = None, seed: int = 0) -> list[Certificate]:
    """Every claim of a recipe, judged.

    Args:
        knobs: of the world, over those of the variations and under those of the claim.
        seed: of the first world; each variation takes the next.

    Raises:
        KeelError: the recipe makes no claim.
    """
    if not recipe.claims:
        raise KeelError(
            f"{recipe.name!r} makes no claim about what it follows. Expected at least one `Claim` in its `claims`: "
            f"`keel audit {recipe.name}` shows what could be said."
        )
    return [judge(recipe.name, recipe.objective, claim, knobs, seed, recipe.dynamic_sampling) for claim in recipe.claims]


def judge(
    name: str, loss: Loss, claim: Claim, knobs: Mapping[str, Any] | None = None, seed: int = 0, live_only: bool = False
) -> Certificate:
    """One claim about a loss, judged in every variation of the world that its conditions leave open."""
    measured = [measure(world, loss, claim) for world in worlds_of(claim, knobs, seed, live_only)]
    worst = max(measured, key=lambda m: m.relative_bias)
    true = worst.relative_bias > claim.tolerance if claim.says == "biased" else worst.relative_bias <= claim.tolerance
    return Certificate(name, claim, worst, true and all(m.numeric <= NUMERIC for m in measured), len(measured))


def worlds_of(claim: Claim, knobs: Mapping[str, Any] | None = None, seed: int = 0, live_only: bool = False) -> Iterable[World]:
    """The random worlds that a claim is judged in."""
    for number, variation in enumerate(VARIATIONS):
        setting = Setting.of({**variation, "live_only": live_only, **(knobs or {}), **claim.conditions})
        yield known_world(setting, seed + number)


@lru_cache(maxsize=256)
def known_world(setting: Setting, seed: int) -> World:
    """The world of this setting and seed, made once."""
    return World.random(setting, seed)


def measure(world: World, loss: Loss, claim: Claim) -> Measured:
    """The expected update against the claim's truth, in one world."""
    expected = expect(world, loss)
    got, truth = expected.direction, truth_gradient(world, claim.truth)
    size = math.sqrt(expected.second_moment)
    scale = float(got @ truth / truth.square().sum()) if truth.norm() > 0 else 0.0
    return Measured(
        relative_bias=_bias(world, claim, got, truth, scale, size),
        cosine=float(got @ truth / (got.norm() * truth.norm())) if got.norm() > 1e-12 * size and truth.norm() > 0 else math.nan,
        scale=scale,
        variance=expected.variance,
        signal_to_noise=expected.signal_to_noise,
        numeric=_numeric_error(world, claim.truth),
        setting=world.setting,
    )


def _bias(world: World, claim: Claim, got: Tensor, truth: Tensor, scale: float, size: float) -> float:
    norm = float(truth.norm())
    if norm < 1e-13:  # nothing to follow
        return float(got.norm()) / size if size > 1e-13 else 0.0
    if claim.says == "mixture":
        return mixture([truth_gradient(world, name) for _, name in parse(claim.truth)], got)[1]
    if claim.says == "unbiased":
        return float((got - truth).norm()) / norm
    if claim.factor:
        return float((got - _factor(claim, world) * truth).norm()) / norm
    left = float((got - scale * truth).norm()) / max(float(got.norm()), 1e-300)
    return left if claim.says == "biased" or scale > 0 else 1.0


def mixture(terms: list[Float[Tensor, " D"]], got: Float[Tensor, " D"]) -> tuple[Float[Tensor, " n"], float]:
    """The best coefficients of some gradients for an update, and what they leave over, relative to it."""
    columns = torch.stack(terms, 1)
    coefficients = torch.linalg.lstsq(columns, got[:, None]).solution[:, 0]
    return coefficients, float((got - columns @ coefficients).norm() / got.norm())


def _factor(claim: Claim, world: World) -> float:
    if claim.factor not in FACTORS:
        raise KeelError(f"No factor is named {claim.factor!r}; {nearest(claim.factor, FACTORS)}Expected: {', '.join(FACTORS)}.")
    return FACTORS[claim.factor](world.setting)


@lru_cache(maxsize=4096)
def truth_gradient(world: World, expression: str) -> Float[Tensor, " D"]:
    """The gradient of a sum of truths, computed once a world."""
    return gradient(world, expression)


@lru_cache(maxsize=4096)
def _numeric_error(world: World, expression: str) -> float:
    by_autograd, by_differences = truth_gradient(world, expression), numeric_gradient(world, expression)
    return float((by_autograd - by_differences).norm() / max(1e-3, float(by_autograd.norm())))


def knobs_text(conditions: Mapping[str, Any]) -> str:
    """Conditions in one phrase."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items()) or "on-policy"


def changed(setting: Setting) -> dict[str, Any]:
    """The knobs of a setting that are not at their defaults."""
    plain = asdict(Setting())
    return {name: value for name, value in asdict(setting).items() if value != plain[name]}
