"""Of what a reward is made: its parts, and how much of the signal is about something else than correctness. Pure.

A part of a Score whose name has no dot was added to the value; one with a dot is a detail of it (`types.Score`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.types import Group, Score

SUM = 1e-6  # how exactly parts have to sum up to the value


def within_groups(value: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Each value less its group's mean."""
    ids, index = group.unique(return_inverse=True)
    total = torch.zeros(len(ids), dtype=value.dtype).index_add(0, index, value)
    return value - (total / torch.bincount(index, minlength=len(ids)))[index]


def beyond_correct(
    reward: Float[Tensor, " B"], correct: Bool[Tensor, " B"], group: Int[Tensor, " B"], scorable: Bool[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Share of the variance of advantages that correctness does not explain; NaN where rewards do not vary.

    1 − (Σ aᵢcᵢ)² / (Σ aᵢ² · Σ cᵢ²), with a the rewards and c the correctness (0 or 1), both less their group's mean, over scorable
    completions: one less the squared correlation within groups. 0: the advantages are those of correctness alone, up to a factor.
    1: where completions of one prompt differ, it is for something else.
    """
    a = within_groups(reward[scorable].double(), group[scorable])
    c = within_groups(correct[scorable].double(), group[scorable])
    varies, differs = a.square().sum(), c.square().sum()
    if not varies > 1e-12 * reward[scorable].double().square().sum():
        return torch.tensor(float("nan"), dtype=torch.float64)
    explained = (a * c).sum().square() / (varies * differs) if differs > 0 else torch.zeros((), dtype=torch.float64)
    return (1.0 - explained).clamp(min=0.0)


def part_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the parts that scorable completions have.

    reward/part/NAME_mean is the mean over those that have it. reward/part/NAME_share is Σ aᵢpᵢ / Σ aᵢ², with a the rewards and p
    what the part added, both less their group's mean: the shares of all parts sum up to 1; one below 0 works against the rest. It
    is there only where every completion has all parts and they sum up to its reward.
    """
    scores = [score for group in groups for score in group.scores if score.value is not None]
    names = sorted({name for score in scores for name in score.parts})
    held = {name: [float(score.parts[name]) for score in scores if name in score.parts] for name in names}
    means = {f"reward/part/{_plain(name)}_mean": sum(values) / len(values) for name, values in held.items()}
    return means | _shares(groups, [name for name in names if "." not in name])


def _shares(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    rows: list[tuple[int, Score]] = []
    for number, group in enumerate(groups):
        rows += [(number, score) for score in group.scores if score.value is not None]
    if not names or any(not _sums_up(score, names) for _, score in rows):
        return {}
    index = torch.tensor([number for number, _ in rows])
    added = {
        name: within_groups(torch.tensor([float(s.parts[name]) for _, s in rows], dtype=torch.float64), index) for name in names
    }
    reward = torch.stack(list(added.values())).sum(0)
    varies = float(reward.square().sum())
    if varies <= 1e-12 * sum(float(score.value or 0.0) ** 2 for _, score in rows):
        return {}
    return {f"reward/part/{_plain(name)}_share": float((reward * part).sum()) / varies for name, part in added.items()}


def _sums_up(score: Score, names: Sequence[str]) -> bool:
    if not all(name in score.parts for name in names):
        return False
    return bool(np.isclose(sum(score.parts[name] for name in names), score.value, rtol=SUM, atol=SUM))


def _plain(name: str) -> str:
    """As a metric's name can hold it."""
    return re.sub(r"[^\w.\-]", "_", name)
