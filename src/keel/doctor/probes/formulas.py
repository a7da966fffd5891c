"""The recipe's formulas once more, in 64 bits: advantages, and a KL to the reference, in the reward or in the loss.

Written down again from their definitions, a group at a time, so that what training computes is held against something that does
not share its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.objectives import advantages, kl
from keel.objectives.advantages import Advantage
from keel.objectives.kl import LossKL, RewardKL
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


def known(advantage: object, reward_kl: RewardKL | None) -> bool:
    """Whether all of it is keel's own, so that its formula is known here."""
    mine = isinstance(advantage, Advantage) and advantage.baseline in BASELINES
    scales = (
        advantages.GroupStd,
        advantages.RawBatchStd,
        advantages.CentredBatchStd,
        advantages.TokenWhitening,
        advantages.TokenStd,
    )
    mine = mine and (advantage.scale is advantages.unscaled or type(advantage.scale) in scales)
    return mine and (reward_kl is None or reward_kl.estimator in ESTIMATORS)


def advantages_by_hand(advantage: Advantage, reward_kl: RewardKL | None, batch: Batch, times: float = 1.0) -> Float[Tensor, "n T"]:
    """Advantages of the rows that can be scored, 0 where masked.

    Args:
        times: what the KL in the reward is multiplied by: −1 pays it out, 0 does not take it off.
    """
    mask = batch.mask[batch.scorable]
    worth = batch.reward.double()[batch.scorable]
    returns, afterwards = worth[:, None].expand(mask.shape), torch.zeros(())
    if reward_kl is not None:
        d = torch.where(batch.mask, batch.logp_old - batch.logp_ref, 0.0).double()[batch.scorable]
        paid = times * reward_kl.kl_coef * kl_by_hand(reward_kl, d, mask)
        whole = paid.sum(1, keepdim=True)
        owed = whole - paid.cumsum(1) + paid if reward_kl.to_go else whole
        if reward_kl.after_normalising:
            afterwards = owed
        else:
            returns, worth = returns - owed, worth - whole[:, 0]
    seen = Rewards(worth, batch.group[batch.scorable], mask)
    baseline = _baseline(BASELINES[advantage.baseline], seen)
    centred = torch.where(mask, returns - baseline[:, None], 0.0)
    return torch.where(mask, _scaled(advantage.scale, centred, worth - baseline, seen) - afterwards, 0.0)


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
