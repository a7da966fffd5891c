"""Exact results that are numbers rather than directions: each computed through the code that trains, next to what theory says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.audit.orders import left_by_length, orders, second_moment, slope
from keel.evaluate.estimates import pass_at_k
from keel.exact.expectation import Outcomes, enumerate_batches, expect, token_gradients
from keel.exact.truths import gradient
from keel.exact.world import MoePolicy, Setting, World
from keel.objectives import aggregate
from keel.objectives.advantages import (
    Advantage,
    CentredBatchStd,
    GroupStd,
    RawBatchStd,
    TokenWhitening,
    group_mean,
)
from keel.objectives.objective import Objective
from keel.objectives.signals import Scored
from keel.objectives.surrogates import Clip, Reinforce, Unclipped

POPULATION_STD = Advantage(group_mean, GroupStd(ddof=0, eps=0.0))


@dataclass(frozen=True)
class Fact:
    """One number against another.

    Args:
        about: the objective or part.
        says: the statement, in words.
        measured: what the code gives.
        expected: what it is compared with.
        relation: "=", within `tolerance`; ">" or "<", more or less than.
        tolerance: absolute.
    """

    about: str
    says: str
    measured: float
    expected: float
    relation: Literal["=", ">", "<"] = "="
    tolerance: float = 1e-10

    @property
    def holds(self) -> bool:
        if self.relation == "=":
            return abs(self.measured - self.expected) <= self.tolerance
        return self.measured > self.expected if self.relation == ">" else self.measured < self.expected

    def as_json(self) -> dict[str, Any]:
        """The stable record of `keel audit --json`: `relative_bias` is the distance, `cosine` and `variance` do not apply."""
        scale = abs(self.expected) or 1.0
        return {
            "objective": self.about,
            "claim": self.says,
            "truth": f"{self.relation} {self.expected:.6g}",
            "conditions": {"measured": self.measured},
            "relative_bias": abs(self.measured - self.expected) / scale,
            "cosine": None,
            "variance": None,
            "holds": self.holds,
        }


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All of them, computed once."""
    return tuple(fact for family in FAMILIES for fact in family())


def group_std_weights() -> list[Fact]:
    """c_G(p), the weight that a division by the group's std gives a prompt; reference values from the exact sum, two decimals."""
    known = {0.001: 2.64, 0.01: 2.61, 0.05: 2.47, 0.1: 2.33, 0.3: 1.96, 0.5: 1.86}
    found = [
        Fact("group_std", f"weight of a prompt with pass rate {p}, G = 8", _weight(p, 8), c, tolerance=0.006)
        for p, c in known.items()
    ]
    cap = Fact("group_std", "it is capped at √(G−1) as p → 0, G = 8", _weight(1e-6, 8), math.sqrt(7), tolerance=1e-3)
    limit = 1 / math.sqrt(0.3 * 0.7)
    return [*found, cap, Fact("group_std", "and tends to 1/√(p(1−p)), p = .3, G = 64", _weight(0.3, 64), limit, tolerance=0.05)]


def graders_under_std() -> list[Fact]:
    """What is left of the gradient of a grader with TPR .8 and FPR .2, under group std, G = 8; two decimals."""
    known = {0.05: 0.50, 0.5: 0.60, 0.9: 0.52}
    says = "a grader with TPR .8, FPR .2 leaves this share at pass rate {}"
    share = {p: _weight(p, 8, tpr=0.8, fpr=0.2) / _weight(p, 8) for p in known}
    return [Fact("noisy_grader_group_std", says.format(p), share[p], known[p], tolerance=0.006) for p in known]


def batch_stds() -> list[Fact]:
    """Prompts at .05 and .95, each with exactly its share right."""
    right = torch.cat([torch.arange(100) < 5, torch.arange(100) < 95]).double()
    scored = _scored(right, torch.arange(2).repeat_interleave(100))
    deviation = right - torch.tensor([0.05, 0.95]).repeat_interleave(100)
    found = []
    for scale, expected in ((RawBatchStd(0, 0.0), 0.50), (CentredBatchStd(0, 0.0), 0.218)):
        divided = Advantage(group_mean, scale)(right[:, None], scored)[:, 0]
        name = "raw_batch_std" if isinstance(scale, RawBatchStd) else "centred_batch_std"
        found.append(Fact(name, "std of prompts at .05 and .95", float((deviation / divided).mean()), expected, tolerance=1e-3))
    return found


def live_groups() -> list[Fact]:
    """P(live), and the factor by which dropping dead groups rescales a centred gradient."""
    setting, p = Setting(vocabulary=2, max_tokens=1, prompts=1, group_size=4), 0.2
    world = World.of_pass_rates([p], group_size=4)
    outcomes = Outcomes.of(world)
    rows, chance = enumerate_batches(setting, outcomes)
    right = outcomes.correct[rows].sum(1)
    live = float(chance[(right > 0) & (right < 4)].sum())
    whole = expect(world, Objective()).direction
    kept = expect(replace(world, setting=replace(world.setting, live_only=True)), Objective()).direction
    scale = float(kept @ whole / (whole @ whole))
    return [
        Fact("dynamic_sampling", "P(live) = 1 − p^G − (1−p)^G", live, 1 - p**4 - (1 - p) ** 4),
        Fact("dynamic_sampling", "dropping dead groups rescales by 1/P(live)", scale, 1 / live, tolerance=1e-9),
    ]


def one_update_a_batch() -> list[Fact]:
    """Q1: does the clip range matter with one update a batch?"""
    world = World.random(Setting(), 0)
    outcomes = Outcomes.of(world)
    rows, _ = enumerate_batches(world.setting, outcomes)
    surrogates = (Reinforce(), Unclipped(), Clip(0.2, 0.2), Clip(0.2, 0.28), Clip(3e-4, 4e-4))
    grads = [token_gradients(world, outcomes, Objective(surrogate=s), rows)[0] for s in surrogates]
    apart = max(float((g - grads[0]).abs().max()) for g in grads)
    gap = World.random(Setting(gap=0.01), 0)
    bound = float(
        ((gap.tree.of_tokens(gap.old) - gap.tree.of_tokens(gap.sampler)).expm1().abs() > 4e-4)[:, gap.tree.mask].double().mean()
    )
    return [
        Fact("clip", "one update a batch: clip .2/.2, .2/.28, 3e-4 and none differ by", apart, 0.0, tolerance=0.0),
        Fact("clip", "share of tokens past 4e-4 by an engine gap of .01 nats alone, if π/μ is clipped", bound, 0.5, ">"),
    ]


def whitened_kl_noise() -> list[Fact]:
    """k1 in the reward of all-right groups, then divided by the std: mean |A| is the same whatever β is."""
    found = []
    for size in (4, 8, 64):
        theory = _mean_abs_standardised(size)
        for beta in (1e-3, 1.0):
            noise = torch.randn(4000, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
            reward = (1.0 - beta * noise).flatten()
            scored = _scored(reward, torch.arange(4000).repeat_interleave(size))
            measured = float(POPULATION_STD(reward[:, None], scored).abs().mean())
            says = f"all answers right, k1 noise with β {beta:g}, G = {size}: mean |A|"
            found.append(Fact("k1_in_reward then group_std", says, measured, theory, tolerance=0.01))
    return found


def truncated_sampling() -> list[Fact]:
    """E[ratio] per token under nucleus sampling: the mass that was kept; 1 when the mask is replayed."""
    found = []
    for replay, about in ((False, "top_p"), (True, "top_p_replayed")):
        world = World.random(Setting(max_tokens=1, prompts=1, vocabulary=5, top_p=0.7, replay_mask=replay), 0)
        kept = world.sampler.isfinite()
        ratio = float(torch.where(kept, world.sampler.exp() * (world.now - world.sampler).exp(), 0.0).sum())
        mass = float(torch.where(kept, world.now.exp(), 0.0).sum())
        found.append(Fact(about, "E[π/μ] of a token", ratio, 1.0 if replay else mass))
        if not replay:
            found.append(Fact(about, "which is not 1", ratio, 0.999, "<"))
    return found


def pass_at_eight() -> list[Fact]:
    """pass@8 from 16 samples of a prompt with pass rate .05."""
    n, k, p = 16, 8, 0.05
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    unbiased = sum(q * pass_at_k(n, c, k) for c, q in enumerate(chance))
    plug_in = sum(q * (1 - (1 - c / n) ** k) for c, q in enumerate(chance))
    return [
        Fact("pass@k", "1 − C(n−c,k)/C(n,k) expects", unbiased, 1 - (1 - p) ** k),
        Fact("pass@k", "the plug-in 1 − (1−c/n)^k expects", plug_in, 0.281, tolerance=5e-4),
    ]


def replayed_routing() -> list[Fact]:
    """R2 at the first update."""
    world = World.random(Setting(policy="moe"), 0)
    assert isinstance(world.policy, MoePolicy)
    replayed = world.policy.replaying(world.policy.chosen(world.theta_old))(world.theta_old)
    return [
        Fact(
            "experts",
            "R2, first update: log-probabilities with replayed routing differ by",
            _apart(replayed, world.old),
            0.0,
            tolerance=0.0,
        )
    ]


def whitening_trap() -> list[Fact]:
    """Three groups of two; the wrong answer of the mixed one is long, so the token-weighted mean is negative."""
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    length = torch.tensor([2, 20, 2, 2, 2, 2])
    scored = _scored(reward, torch.tensor([0, 0, 1, 1, 2, 2]), length)
    whitened = Advantage(group_mean, TokenWhitening())(reward[:, None].expand(scored.mask.shape), scored)
    divided = Advantage(group_mean, CentredBatchStd())(reward[:, None].expand(scored.mask.shape), scored)
    return [
        Fact("token_whitening", "advantage of a group that is wrong throughout", float(whitened[4, 0]), 0.1, ">"),
        Fact("centred_batch_std", "advantage of a group that is wrong throughout", float(divided[4, 0]), 0.0, tolerance=0.0),
    ]


def micro_batches() -> list[Fact]:
    """Does a memory setting change the objective?"""
    found = []
    for mean, about in ((aggregate.token_mean, "token_mean"), (_own_token_mean, "token mean per micro-batch")):
        objective = Objective(aggregate=mean)
        whole, cut = (expect(World.random(Setting(cuts=cuts), 0), objective).direction for cuts in (1, 3))
        apart = _sine(whole, cut)
        says = "one micro-batch or three: sine of the angle between the expected updates"
        found.append(Fact(about, says, apart, 0.0 if about == "token_mean" else 0.01, "=" if about == "token_mean" else ">", 1e-7))
    return found


def leak_of_a_token_mean() -> list[Fact]:
    """The bias of a token mean over the group falls as one over the group size."""
    sizes, objective = (8.0, 16.0, 32.0), Objective(aggregate=aggregate.group_token_mean)
    worlds = [World.random(Setting(prompts=1, vocabulary=2, max_tokens=3, group_size=int(size)), 0) for size in sizes]
    left = [_sine(expect(world, objective).direction, gradient(world, "J")) for world in worlds]
    return [Fact("group_token_mean", "its bias falls with G as G to the power of", slope(sizes, left), -1.0, tolerance=0.1)]


def orders_of_error() -> list[Fact]:
    """Token and sequence ratios against the mismatch δ, the length, and their variance."""
    by = {order.ratio: order for order in orders()}
    shares = left_by_length((1, 3, 6))
    whole, product = second_moment(5)
    return [
        Fact("token_ratio", "order in δ of the objective's error", by["token"].objective, 2.0, tolerance=0.05),
        Fact("token_ratio", "order in δ of the gradient's error", by["token"].gradient, 1.0, tolerance=0.05),
        Fact("sequence_ratio", "gradient error left, of that without a ratio", by["sequence"].left, 0.0),
        Fact("token_ratio", "gradient error left at T = 1", max(shares[1]), 0.0),
        Fact("token_ratio", "gradient error left at T = 3, median of ten worlds", _median(shares[3]), 0.3, ">"),
        Fact("token_ratio", "gradient error left at T = 6, median of ten worlds", _median(shares[6]), 0.3, ">"),
        Fact("sequence_ratio", "second moment of its weight against (1 + χ²)^T, T = 5", whole, product),
    ]


FAMILIES: tuple[Callable[[], list[Fact]], ...] = (
    one_update_a_batch, group_std_weights, graders_under_std, batch_stds, live_groups, whitened_kl_noise, whitening_trap,
    micro_batches, leak_of_a_token_mean, truncated_sampling, orders_of_error, replayed_routing, pass_at_eight,
)  # fmt: skip


def _weight(p: float, group_size: int, **grader: float) -> float:
    """c_G(p) through the objective: the expected update against ∇p, in a world of one prompt and one token."""
    world = World.of_pass_rates([p], group_size=group_size, **grader)
    truth = gradient(world, "J")
    return float(expect(world, Objective(advantage=POPULATION_STD)).direction @ truth / (truth @ truth))


def _mean_abs_standardised(size: int) -> float:
    """E|(x − mean)/std| of `size` Gaussian draws, with the population's std."""
    beta = math.exp(math.lgamma(0.5) + math.lgamma(size / 2 - 1) - math.lgamma(size / 2 - 0.5))
    return math.sqrt(size - 1) / (beta * (size / 2 - 1))


def _scored(reward: Float[Tensor, " B"], group: Tensor, length: Tensor | None = None) -> Scored:
    length = torch.ones_like(group) if length is None else length
    return Scored(reward, group, torch.ones_like(group, dtype=torch.bool), torch.arange(int(length.max())) < length[:, None])


def _own_token_mean(loss: Tensor, prepared, counts) -> Tensor:
    """The fault: each micro-batch divides by its own tokens."""
    return (loss * prepared.mask).sum() / prepared.mask.sum().clamp(min=1)


def _sine(a: Tensor, b: Tensor) -> float:
    return float((a - (a @ b) / (b @ b) * b).norm() / a.norm())


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _median(ordered: list[float]) -> float:
    return float(torch.tensor(ordered, dtype=torch.float64).quantile(0.5))
