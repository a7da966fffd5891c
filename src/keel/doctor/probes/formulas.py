"""The recipe's formulas once more, in 64 bits: shaped rewards, advantages, the loss, a KL, and the optimizer's step.

Written down again from their definitions, a group at a time, so that what training computes is held against something that does
not share its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.config import TrainSettings
from keel.objectives import advantages, kl, log_ratios, shaping, surrogates
from keel.objectives.advantages import Advantage
from keel.objectives.kl import LossKL, RewardKL
from keel.objectives.objective import Objective
from keel.types import Batch

BASELINES: dict[object, str] = {
    advantages.group_mean: "group",
    advantages.sibling_mean: "siblings",
    advantages.batch_mean: "batch",
    advantages.zero: "none",
}
ESTIMATORS: dict[object, Callable[[Tensor], Tensor]] = {
    kl.k1: lambda d: d,
    kl.k2: lambda d: d**2 / 2,
    kl.k3: lambda d: torch.exp(-d) - 1 + d,
    kl.k3_clamped: lambda d: torch.clip(torch.exp(-d) - 1 + d, -10, 10),
}


@dataclass(frozen=True)
class Rewards:
    """What a formula is applied to: the rewards of the completions that count, their groups, and the tokens that are trained."""

    worth: Float[Tensor, " n"]
    group: Int[Tensor, " n"]
    mask: Bool[Tensor, "n T"]


def known(objective: Objective) -> bool:
    """Whether advantages are made of keel's own pieces alone, whose formulas are here."""
    advantage, reward_kl = objective.advantage, objective.reward_kl
    mine = isinstance(advantage, Advantage) and advantage.baseline in BASELINES
    scales = (
        advantages.GroupStd,
        advantages.RawBatchStd,
        advantages.CentredBatchStd,
        advantages.TokenWhitening,
        advantages.TokenStd,
    )
    mine = mine and (advantage.scale is advantages.unscaled or type(advantage.scale) in scales)
    shapes = all(type(shape) in (shaping.OverlongFilter, shaping.SoftOverlong) for shape in objective.shaping)
    return mine and shapes and (reward_kl is None or reward_kl.estimator in ESTIMATORS)


def advantages_by_hand(objective: Objective, batch: Batch, cap: int, times: float = 1.0) -> Float[Tensor, "B T"]:
    """Advantages, 0 where nothing is trained.

    Args:
        times: what the KL in the reward is multiplied by: −1 pays it out, 0 does not take it off.
    """
    counted, trained, worth = _shaped(objective, batch, cap)
    mask, worth = trained[counted], worth[counted]
    returns, afterwards, reward_kl = worth[:, None].expand(mask.shape), torch.zeros(()), objective.reward_kl
    if reward_kl is not None:
        d = torch.where(trained, batch.logp_old - batch.logp_ref, 0.0).double()[counted]
        paid = times * reward_kl.kl_coef * kl_by_hand(reward_kl, d, mask)
        whole = paid.sum(1, keepdim=True)
        owed = whole - paid.cumsum(1) + paid if reward_kl.to_go else whole
        if reward_kl.after_normalising:
            afterwards = owed
        else:
            returns, worth = returns - owed, worth - whole[:, 0]
    seen = Rewards(worth, batch.group[counted], mask)
    baseline = _baseline(BASELINES[objective.advantage.baseline], seen)
    centred = torch.where(mask, returns - baseline[:, None], 0.0)
    out = torch.zeros(batch.mask.shape, dtype=torch.float64)
    out[counted] = torch.where(mask, _scaled(objective.advantage.scale, centred, worth - baseline, seen) - afterwards, 0.0)
    return out


def _shaped(objective: Objective, batch: Batch, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which completions count [B], which tokens are trained [B, T], and what completions are worth [B]."""
    counted, trained = batch.scorable.clone(), batch.mask & batch.scorable[:, None]
    worth = torch.where(batch.scorable, batch.reward.double(), 0.0)
    for shape in objective.shaping:
        if isinstance(shape, shaping.OverlongFilter):
            trained = trained & ~batch.truncated[:, None]
            counted = counted if shape.in_baseline else counted & ~batch.truncated
        else:
            free = max(1, round(shape.buffer_share * cap))
            over = (batch.completion_len.double() - (cap - free)) / free
            worth = worth - shape.scale * over.clamp(0.0, 1.0) * counted
    return counted, trained, worth


def weight_by_hand(objective: Objective, log_ratio: Tensor, gap: Tensor, advantage: Tensor, mask: Tensor) -> Tensor | None:
    """What −A · ∇ log π of each token is multiplied by [B, T]; None where the surrogate's formula is not known here.

    Args:
        log_ratio, gap: log π/π_old and log π_old/μ of single tokens, 0 where masked.
    """
    surrogate, up = objective.surrogate, advantage > 0
    if objective.log_ratio not in RATIOS or type(surrogate) not in WEIGHTS:
        return None
    ratio = RATIOS[objective.log_ratio](log_ratio, mask).expand(mask.shape).exp()
    return WEIGHTS[type(surrogate)](surrogate, ratio, log_ratio, gap, up, mask)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


RATIOS: dict[object, Callable[[Tensor, Tensor], Tensor]] = {
    log_ratios.token: lambda x, mask: x,
    log_ratios.sequence: lambda x, mask: x.sum(1, keepdim=True),
    log_ratios.geometric_mean: _mean,
    log_ratios.prefix: lambda x, mask: x.cumsum(1),
}


def _clip(s: surrogates.Clip | surrogates.MiniRL, ratio: Tensor, up: Tensor) -> Tensor:
    """r where neither a right token is beyond 1 + ε_high nor a wrong one below 1 − ε_low."""
    return torch.where(up, ratio * (ratio <= 1 + s.clip_high), ratio * (ratio >= 1 - s.clip_low))


def _minirl(s: surrogates.MiniRL, ratio: Tensor, gap: Tensor, up: Tensor) -> Tensor:
    return (_clip(s, ratio, up) > 0) * torch.clamp(ratio * gap.exp(), max=s.cap)


def _gmpo(s: surrogates.Gmpo, log_ratio: Tensor, up: Tensor, mask: Tensor) -> Tensor:
    most = s.log_clip
    inside = torch.where(up, log_ratio <= most, log_ratio >= -most)
    held = torch.where(up, log_ratio.clamp(max=most), log_ratio.clamp(min=-most))
    return inside * _mean(torch.where(mask, held, 0.0), mask).exp()


def _sapo(s: surrogates.Sapo, ratio: Tensor, up: Tensor) -> Tensor:
    gate = torch.sigmoid(torch.where(up, s.tau_positive, s.tau_negative) * (ratio - 1))
    return 4 * ratio * gate * (1 - gate)


WEIGHTS: dict[type, Callable[..., Tensor]] = {
    surrogates.Reinforce: lambda s, ratio, *_: torch.ones_like(ratio),
    surrogates.Unclipped: lambda s, ratio, *_: ratio,
    surrogates.Clip: lambda s, ratio, x, gap, up, mask: _clip(s, ratio, up),
    surrogates.DualClip: lambda s, ratio, x, gap, up, mask: _clip(s, ratio, up) * (up | (ratio <= s.dual)),
    surrogates.Cispo: lambda s, ratio, *_: ratio.clamp(max=s.cap),
    surrogates.MiniRL: lambda s, ratio, x, gap, up, mask: _minirl(s, ratio, gap, up),
    surrogates.Gmpo: lambda s, ratio, x, gap, up, mask: _gmpo(s, x, up, mask),
    surrogates.Sapo: lambda s, ratio, x, gap, up, mask: _sapo(s, ratio, up),
}


def kl_by_hand(term: RewardKL | LossKL, d: Float[Tensor, "n T"], mask: Bool[Tensor, "n T"]) -> Float[Tensor, "n T"]:
    """k(d) at each trained token by the term's level, without its coefficient; d is 0 where masked."""
    estimator = ESTIMATORS[term.estimator]
    if term.level is kl.per_token:
        return torch.where(mask, estimator(d), 0.0)
    if term.level is kl.per_prefix:
        return torch.where(mask, estimator(d.cumsum(1)), 0.0)
    return torch.where(mask, estimator(d.sum(1, keepdim=True)) / mask.sum(1, keepdim=True).clamp(min=1), 0.0)


def _baseline(kind: str, seen: Rewards) -> Float[Tensor, " n"]:
    if kind == "none":
        return torch.zeros_like(seen.worth)
    if kind == "batch":
        return seen.worth.mean().expand(seen.worth.shape)
    out = torch.empty_like(seen.worth)
    for group in seen.group.unique():
        rows = seen.group == group
        own = seen.worth[rows]
        out[rows] = own.mean() if kind == "group" or len(own) == 1 else (own.sum() - own) / (len(own) - 1)
    return out


def _scaled(scale: object, advantage: Float[Tensor, "n T"], centred: Float[Tensor, " n"], seen: Rewards) -> Float[Tensor, "n T"]:
    if isinstance(scale, advantages.GroupStd):
        out = advantage.clone()
        for group in seen.group.unique():
            rows = seen.group == group
            out[rows] /= _std(seen.worth[rows], scale.ddof) + scale.eps
        return out
    if isinstance(scale, (advantages.RawBatchStd, advantages.CentredBatchStd)):
        spread = seen.worth if isinstance(scale, advantages.RawBatchStd) else centred
        return advantage / (_std(spread, scale.ddof) + scale.eps)
    if isinstance(scale, (advantages.TokenWhitening, advantages.TokenStd)):
        tokens = advantage[seen.mask]
        shift = tokens.mean() if isinstance(scale, advantages.TokenWhitening) else 0.0
        return (advantage - shift) / (_std(tokens, 0) ** 2 + scale.eps) ** 0.5
    return advantage


def _std(values: Float[Tensor, " n"], ddof: int) -> Tensor:
    return ((values - values.mean()).square().sum() / max(1, len(values) - ddof)).sqrt()


# ── the optimizer ─────────────────────────────────────────────────────────────────────────────────────────────────────


class AdamW:
    """A few steps of some weights, without moments yet; gradients are cut to their norm with those of all others.

    Source: Loshchilov and Hutter, arXiv 1711.05101. Differs from it: in nothing.
    """

    def __init__(self, train: TrainSettings, parameters: Mapping[str, Tensor]):
        self.train, self.steps = train, 0
        self.weights = {name: p.detach().double().clone() for name, p in parameters.items()}
        self.first, self.second = ({name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(2))

    def step(self, gradient: Mapping[str, Tensor | None], rate: float) -> Float[Tensor, " n"]:
        """All weights afterwards, as one vector."""
        train, (b1, b2) = self.train, self.train.betas
        self.steps += 1
        norm = sum(float(g.double().square().sum()) for g in gradient.values() if g is not None) ** 0.5
        shrunk = train.max_grad_norm / norm if train.max_grad_norm is not None and norm > train.max_grad_norm else 1.0
        for name, w in self.weights.items():
            if gradient[name] is None:
                continue
            g = shrunk * gradient[name].double()
            self.first[name] = b1 * self.first[name] + (1 - b1) * g
            self.second[name] = b2 * self.second[name] + (1 - b2) * g.square()
            size = (self.second[name] / (1 - b2**self.steps)).sqrt() + train.eps
            self.weights[name] = w - rate * train.weight_decay * w - rate * self.first[name] / (1 - b1**self.steps) / size
        return torch.cat([w.flatten() for w in self.weights.values()])


def rate_by_hand(train: TrainSettings, clock: int, steps: int) -> float:
    """The learning rate of the update after `clock` others."""
    if clock < train.warmup_steps:
        return train.lr * (clock + 1) / train.warmup_steps
    left = 1 - (clock - train.warmup_steps) / max(1, steps - train.warmup_steps)
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return train.lr * shapes[train.lr_schedule]
