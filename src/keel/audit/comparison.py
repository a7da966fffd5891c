"""Sampled gradients of several objectives: each alone, and each against another, in numbers with intervals and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.audit.jackknife import Estimate, exactly, mean, multiple, product, ratio, root, spread

WORDS = {
    "signal_to_noise": "norm of the mean gradient over the root of the covariance's trace, for one step",
    "step_cosine": "cosine of one step's gradient to the mean gradient, over steps that have one",
    "scale": "the best multiple: A ≈ scale · B",
    "relative_bias": "norm of E[A] − E[B], relative to E[B]",
    "bias_after_scale": "norm of what the best multiple of E[B] leaves of E[A], relative to E[A]",
    "cosine": "cosine between E[A] and E[B]",
    "variance_ratio": "trace of A's covariance over B's",
    "groups_ratio": "how many times B's groups A needs for the same signal-to-noise",
}
SAME = 0.05  # left over after the best scale, below which two directions are called the same


@dataclass(frozen=True)
class Sampled:
    """What was sampled, and how it was looked at.

    Args:
        groups, group_size, groups_per_step: completions are grouped, and groups make steps.
        accuracy: share of right answers; live: share of groups with right and wrong ones; length: tokens of a completion.
        staleness, from_reference: mean |logp − logp_old| and |logp − logp_ref| of a token, nats; 0 where these were not needed.
        parameters, projection: numbers in a gradient, and in what was kept of it.
        projection_error: relative standard deviation that this adds to a squared norm.
    """

    model: str
    task: str
    groups: int
    group_size: int
    groups_per_step: int
    seed: int
    accuracy: float
    live: float
    length: float
    staleness: float
    from_reference: float
    parameters: int
    projection: int
    projection_error: float
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.groups // self.groups_per_step


@dataclass(frozen=True)
class Alone:
    """One objective by itself.

    Args:
        live: share of steps whose gradient is not exactly zero.
        signal_to_noise, step_cosine: see `WORDS`.
    """

    live: float
    signal_to_noise: Estimate
    step_cosine: Estimate


@dataclass(frozen=True)
class Against:
    """Objective A against objective B, paired step by step; see `WORDS`.

    Args:
        proportional: A is `scale` times B in every single step, so nothing is left to chance.
    """

    scale: Estimate
    relative_bias: Estimate
    bias_after_scale: Estimate
    cosine: Estimate
    variance_ratio: Estimate
    groups_ratio: Estimate
    proportional: bool = False


def alone(a: Float[Tensor, "n m"]) -> Alone:
    """Signal and noise of sampled gradients."""
    size, n = a.norm(dim=1), len(a)
    live = (size > 0).double()
    if not live.any():
        return Alone(0.0, exactly(0.0, n), exactly(math.nan, n))
    unit = a / torch.where(size > 0, size, 1.0)[:, None]
    squared, noise = product(a, a), spread(a)
    along = product(unit, a) / mean(live).clamp(min=1e-12)
    return Alone(
        live=float(live.mean()),
        signal_to_noise=ratio(squared, noise, within=(0.0, math.inf)).through(math.sqrt),
        step_cosine=ratio(along, root(squared), sure=(squared,), within=(-1.0, 1.0), silent=(0.0, 1.0)),
    )


def against(a: Float[Tensor, "n m"], b: Float[Tensor, "n m"]) -> Against:
    """Sampled gradients of A against those of B on the same steps."""
    times = multiple(a, b)
    if times is not None:
        return _proportional(times, len(a))
    if not a.any() or not b.any():
        return _against_nothing(len(a), a_is_zero=not a.any(), b_is_zero=not b.any())
    aa, ab, bb, apart = product(a, a), product(a, b), product(b, b), product(a - b, a - b)
    noise_a, noise_b, sure = spread(a), spread(b), (aa, bb)
    positive = (0.0, math.inf)
    scale = ratio(ab, bb, silent=(0.0, 1.0))
    cosine = ratio(ab, root(aa * bb), sure=sure, within=(-1.0, 1.0), silent=(0.0, 1.0))
    bias = ratio(apart, bb, within=positive, silent=(0.0, 1.0)).through(math.sqrt)
    return Against(
        scale=scale,
        relative_bias=_at_least(bias, max(scale.low - 1.0, 1.0 - scale.high)),
        bias_after_scale=_left_over(cosine),
        cosine=cosine,
        variance_ratio=ratio(noise_a, noise_b, within=positive, silent=(0.5, 2.0)),
        groups_ratio=ratio(root(noise_a * bb), root(noise_b * aa), sure=sure, within=positive, silent=(0.7, 1.4)).through(_square),
    )


def _at_least(bias: Estimate, floor: float) -> Estimate:
    """A bias is never below |1 − scale|, and the scale is often known better."""
    if not 0.0 < floor < math.inf or floor <= bias.low:
        return bias
    high = max(bias.high, floor)
    return replace(bias, value=max(bias.value, floor), low=floor, high=high, more=0)


def _left_over(cosine: Estimate) -> Estimate:
    """√(1 − cosine²), which falls on both sides of 0."""
    value, low, high = (math.sqrt(max(0.0, 1.0 - c * c)) for c in (cosine.value, cosine.low, cosine.high))
    most = 1.0 if cosine.low <= 0.0 <= cosine.high else max(low, high)
    return replace(cosine, value=value, low=min(low, high), high=most)


def _square(x: float) -> float:
    return x * x


def _proportional(scale: float, n: int) -> Against:
    return Against(
        scale=exactly(scale, n),
        relative_bias=exactly(abs(1 - scale), n),
        bias_after_scale=exactly(0.0, n),
        cosine=exactly(math.copysign(1.0, scale), n),
        variance_ratio=exactly(scale**2, n),
        groups_ratio=exactly(1.0, n),
        proportional=True,
    )


def _against_nothing(n: int, a_is_zero: bool, b_is_zero: bool) -> Against:
    """Where a gradient is zero in every step, only A = 0 against some B can be told in numbers."""
    none = exactly(math.nan, n)
    if b_is_zero or not a_is_zero:
        return Against(none, none, none, none, none, none)
    return Against(exactly(0.0, n), exactly(1.0, n), none, none, exactly(0.0, n), none)


@dataclass(frozen=True)
class MonteCarlo:
    """Sampled gradients, and what they say.

    Args:
        sampled: what they were sampled from.
        gradients: update direction of each objective on each step, projected: [steps, projection]; steps are paired.
        baseline: the objective that the others are compared with.
    """

    sampled: Sampled
    gradients: Mapping[str, Float[Tensor, "steps projection"]]
    baseline: str

    @cached_property
    def alone(self) -> dict[str, Alone]:
        """Each objective by itself."""
        return {name: alone(a) for name, a in self.gradients.items()}

    @cached_property
    def pairs(self) -> dict[str, Against]:
        """Each other objective against the baseline."""
        return {name: self.compare(name, self.baseline) for name in self.gradients if name != self.baseline}

    def compare(self, a: str, b: str) -> Against:
        """A against B, for any two of them."""
        return against(self.gradients[a], self.gradients[b])

    def text(self) -> str:
        """A paragraph, a table of each alone and one of each against the baseline, and a sentence about each."""
        parts = [self._heading(), self._alone_table()]
        if self.pairs:
            parts += [self._pair_table(), "\n".join(self.says(name) for name in self.pairs)]
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """{"sampled": …, "live_steps": {objective: share of steps with a gradient}, "estimates": [record, …]}."""
        live = {name: own.live for name, own in self.alone.items()}
        return {"sampled": asdict(self.sampled), "live_steps": live, "estimates": self.records()}

    def records(self) -> list[dict[str, Any]]:
        """One record for each number: whose it is, the number, its interval, the groups behind it, and how many more are wanted."""
        found = []
        for name, own in self.alone.items():
            found += [self._record(name, None, key, getattr(own, key)) for key in ("signal_to_noise", "step_cosine")]
        for name, pair in self.pairs.items():
            found += [self._record(name, self.baseline, key, e) for key, e in vars(pair).items() if isinstance(e, Estimate)]
        return found

    def says(self, name: str) -> str:
        """One sentence about an objective against the baseline."""
        pair, other = self.pairs[name], self.baseline
        silent = [who for who in (name, other) if self.alone[who].live == 0.0]
        if silent:
            return f"{' and '.join(silent)}: the gradient was exactly zero in every step, so there is no direction to compare."
        if pair.proportional:
            way = "same" if pair.scale.value > 0 else "opposite"
            return f"{name} is {pair.scale.value:.4g} times {other} in every step: the {way} direction, the same noise."
        left = pair.bias_after_scale
        if not left.enough:
            wanted = left.wanted(self.sampled.groups_per_step)
            return f"{name} against {other}: too few samples to compare their directions; {wanted} groups{self._noise(pair)}."
        if left.high <= SAME:
            direction = f"points where {other} points: at most {left.high:.2g} of it is left over after the best scale"
        elif left.low > 0:
            direction = f"is no multiple of {other}: after the best scale, {left} of it is left over; cosine {pair.cosine}"
        else:
            direction = f"shows no other direction than {other}: at most {left.high:.2g} of it is left over after the best scale"
        return f"{name} {direction}{self._noise(pair)}."

    def _noise(self, pair: Against) -> str:
        times = pair.groups_ratio
        if not times.enough or times.low <= 1 <= times.high:
            return ""
        return f"; it needs {times} times the groups for the same signal"

    def _heading(self) -> str:
        s = self.sampled
        apart = f"stale by {s.staleness:.2g} nats a token" if s.staleness else "on-policy"
        kl = (
            f"{s.from_reference:.2g} nats a token from the reference"
            if s.from_reference
            else "the reference of KL terms is the policy itself"
        )
        seen = "whole gradients" if not s.projection_error else f"{s.projection:,} random sums, good to ±{s.projection_error:.1%}"
        return (
            f"{s.model} on {s.task}: {s.groups} groups of {s.group_size}, {_counted(s.groups_per_step, 'group')} a step, seed "
            f"{s.seed}; {s.accuracy:.0%} right, {s.live:.0%} of groups with right and wrong answers, {s.length:.1f} tokens a "
            "completion.\n"
            f"{apart.capitalize()}, {kl}. {s.parameters:,} parameters seen through {seen}. In brackets: 95 % intervals over "
            f"{s.steps} steps."
        )

    def _alone_table(self) -> str:
        rows = [["", "steps with a gradient", "signal to noise of a step", "cosine of a step to the mean"]]
        for name, own in self.alone.items():
            rows.append([name, f"{own.live:.0%}", *(self._cell(e) for e in (own.signal_to_noise, own.step_cosine))])
        return _table(rows)

    def _pair_table(self) -> str:
        heads = {
            "scale": "best scale",
            "relative_bias": "bias",
            "bias_after_scale": "bias after scaling",
            "cosine": "cosine",
            "variance_ratio": "variance",
            "groups_ratio": "groups, same signal",
        }
        rows = [[f"against {self.baseline}", *heads.values()]]
        rows += [[name, *(self._cell(getattr(pair, key)) for key in heads)] for name, pair in self.pairs.items()]
        return _table(rows)

    def _cell(self, estimate: Estimate) -> str:
        return str(estimate) if estimate.enough else f"too few: {estimate.wanted(self.sampled.groups_per_step)}"

    def _record(self, name: str, other: str | None, quantity: str, e: Estimate) -> dict[str, Any]:
        finite = {key: x if math.isfinite(x) else None for key, x in (("value", e.value), ("low", e.low), ("high", e.high))}
        groups = self.sampled.groups_per_step
        return {
            "objective": name,
            "against": other,
            "quantity": quantity,
            "means": WORDS[quantity],
            **finite,
            "groups": e.samples * groups,
            "enough": e.enough,
            "more_groups": e.more * groups,
        }


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _counted(number: int, thing: str) -> str:
    return f"{'one' if number == 1 else number} {thing}{'s' if number != 1 else ''}"
