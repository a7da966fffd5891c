"""Of which order is an error? Slopes of what a surrogate gets wrong, against the mismatch δ of sampler and policy, and length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keel.exact.truths import expected_reward
from keel.exact.world import Setting, World

MISMATCHES = (0.01, 0.02, 0.04)
LENGTHS = (1, 2, 3, 4, 5, 6)
RATIOS = ("none", "token", "sequence")


@dataclass(frozen=True)
class Order:
    """How fast the error of one importance ratio grows.

    Args:
        ratio: "none", "token" or "sequence".
        objective: slope of log |error of the objective's value| against log δ; NaN where the error is zero.
        gradient: the same of the gradient.
        left: gradient error as a share of the error without a ratio, at the largest δ.
        variance: trace of the covariance of a single sample's gradient, relative to on-policy, at the largest δ.
    """

    ratio: str
    objective: float
    gradient: float
    left: float
    variance: float


def orders(setting: Setting | None = None, seed: int = 0, mismatches: Sequence[float] = MISMATCHES) -> list[Order]:
    """The order in δ of each ratio, for rewards that depend on every token and samples that are stale by δ a logit."""
    setting = setting or Setting(max_tokens=3, prompts=1, reward="real")
    errors = {ratio: [_Errors.of(World.random(replace(setting, drift=d), seed), ratio) for d in mismatches] for ratio in RATIOS}
    fresh = _Errors.of(World.random(setting, seed), "none").variance
    return [
        Order(
            ratio=ratio,
            objective=slope(mismatches, [e.objective for e in found]),
            gradient=slope(mismatches, [e.gradient for e in found]),
            left=found[-1].gradient / errors["none"][-1].gradient,
            variance=found[-1].variance / fresh,
        )
        for ratio, found in errors.items()
    ]


def left_by_length(lengths: Sequence[int] = LENGTHS, drift: float = 0.1, worlds: int = 10) -> dict[int, list[float]]:
    """Gradient error of the token ratio as a share of the error without one, by length, in ascending order over worlds."""
    found = {}
    for length in lengths:
        setting = Setting(max_tokens=length, prompts=1, reward="real", drift=drift)
        pairs = [[_Errors.of(World.random(setting, seed), ratio).gradient for ratio in ("token", "none")] for seed in range(worlds)]
        found[length] = sorted(token / none for token, none in pairs)
    return found


def second_moment(length: int, drift: float = 0.3, seed: int = 0) -> tuple[float, float]:
    """E_μ[(π/μ)²] of whole completions, all of `length` tokens whose χ² does not depend on the prefix, and (1 + χ²)^length."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(3, generator=generator, dtype=torch.float64)
    now = (old + drift * torch.randn(3, generator=generator, dtype=torch.float64)).log_softmax(-1)
    old = old.log_softmax(-1)
    rows = torch.cartesian_prod(*[torch.arange(3)] * length).view(-1, length)
    whole = (2 * now[rows].sum(1) - old[rows].sum(1)).exp().sum()
    return float(whole), float((2 * now - old).exp().sum()) ** length


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x by least squares; NaN where y is zero up to rounding."""
    if min(y) < 1e-12:
        return math.nan
    logs = [torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (x, y)]
    logs = [values - values.mean() for values in logs]
    return float((logs[0] @ logs[1]) / logs[0].square().sum())


@dataclass(frozen=True)
class _Errors:
    objective: float
    gradient: float
    variance: float

    @classmethod
    def of(cls, world: World, ratio: str) -> _Errors:
        """Errors of J(μ) + E_μ[Σₜ (ratioₜ − 1) R] and of its gradient, against J(π) and ∇J(π), for samples of π_old."""
        theta = world.theta.clone().requires_grad_()
        truth = expected_reward(world, theta)
        of_sample = _surrogate(world, theta, ratio)
        sampled = world.tree.of_completions(world.old).exp()
        value = ((of_sample + world.reward) * sampled).sum(1).mean()
        gap = torch.autograd.grad(truth, theta, retain_graph=True)[0] - torch.autograd.grad(value, theta, retain_graph=True)[0]
        return cls(abs(float((truth - value).detach())), float(gap.norm()), _variance(theta, of_sample, sampled))


def _surrogate(world: World, theta: Tensor, ratio: str) -> Tensor:
    """[P, N] what each completion adds to the surrogate beyond its reward; its gradient is the estimator's."""
    log_ratio = world.tree.of_tokens(world.policy(theta)) - world.tree.of_tokens(world.old)
    if ratio == "sequence":
        return log_ratio.sum(-1).expm1() * world.reward
    if ratio == "token":
        return (log_ratio.expm1() * world.tree.mask).sum(-1) * world.reward
    return (log_ratio - log_ratio.detach()).sum(-1) * world.reward


def _variance(theta: Tensor, of_sample: Tensor, sampled: Tensor) -> float:
    """Trace of the covariance of one sample's gradient; a mean over prompts."""
    eye = torch.eye(of_sample.numel(), dtype=theta.dtype).view(-1, *of_sample.shape)
    rows = torch.autograd.grad(of_sample, theta, eye, is_grads_batched=True)[0]
    chance = (sampled / len(sampled)).flatten()
    return float((chance @ rows.square().sum(1) - (chance @ rows).square().sum()).detach())


def orders_json(found: Sequence[Order]) -> list[Mapping[str, object]]:
    """Plain records, with null where an order is undefined."""
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(order).items()} for order in found]
