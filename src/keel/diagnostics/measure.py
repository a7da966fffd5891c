"""measure: one optimizer step's batch and log-probabilities → named numbers. Pure, without gradient."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.diagnostics import gap, routing
from keel.diagnostics.parts import beyond_correct
from keel.objectives.corrections import weight
from keel.objectives.kl import k3
from keel.objectives.objective import Objective
from keel.objectives.signals import Prepared, TokenView, keep
from keel.types import Batch, StepCounts

OFF_POLICY_NATS = 1e-6


class Measured(dict[str, tuple[Tensor, Tensor]]):
    """Numbers on their way out: name → (value, how many things it speaks of). One transfer at the end."""

    def mean(self, name: str, value: Tensor, where: Bool[Tensor, "..."]) -> None:
        count = where.sum()
        self[name] = keep(value.double(), where).sum() / count, count

    def std(self, name: str, value: Tensor, where: Bool[Tensor, "..."]) -> None:
        count = where.sum()
        centred = value.double() - keep(value.double(), where).sum() / count
        self[name] = (keep(centred.square(), where).sum() / count).sqrt(), count

    def largest(self, name: str, value: Tensor, where: Bool[Tensor, "..."]) -> None:
        self[name] = torch.where(where, value.double(), float("-inf")).amax(), where.sum()

    def numbers(self) -> dict[str, float]:
        """Plain floats; what speaks of nothing is left out."""
        values = torch.stack([value.double() for value, _ in self.values()]).tolist()
        counts = torch.stack([count for _, count in self.values()]).tolist()
        return {name: value for name, value, count in zip(self, values, counts, strict=True) if count}


@torch.no_grad()
def measure(
    batch: Batch,
    prepared: Prepared,
    logp: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    objective: Objective,
    counts: StepCounts,
) -> dict[str, float]:
    """Everything that can be said of one optimizer step from its own rows.

    Args:
        batch, prepared, counts: of the whole step.
        logp, entropy: [B, T] nats, as the loss saw them.
        objective: whose clip is asked where it binds.

    Returns the metrics of the families reward, group, length, advantage, policy, gap, kl and tokens; one for which
    there was nothing to measure is absent. What stands under a False mask changes nothing.
    """
    out = Measured()
    view = objective.view(logp, entropy, batch, prepared)
    _reward(out, batch)
    _groups(out, batch, prepared)
    _lengths(out, batch)
    _advantages(out, view)
    _policy(out, view, objective.surrogate.bound(view))
    if batch.logp_old is not None:  # without it the update *is* on-policy, and staleness was not measured
        _staleness(out, view)
    _gap(out, view, batch)
    if objective.corrections:
        _corrected(out, logp, entropy, batch, prepared, objective)
    _reference(out, view)
    return out.numbers() | {"tokens/step": float(counts.tokens)}


def _reward(out: Measured, batch: Batch) -> None:
    reward = keep(batch.reward, batch.scorable)
    out.mean("reward/mean", reward, batch.scorable)
    out.std("reward/std", reward, batch.scorable)
    out.mean("reward/correct_frac", batch.correct, batch.scorable)
    out.mean("reward/unscorable_frac", ~batch.scorable, torch.ones_like(batch.scorable))
    out.mean("reward/truncated_mean", reward, batch.scorable & batch.truncated)
    out.mean("reward/finished_mean", reward, batch.scorable & ~batch.truncated)
    beyond = beyond_correct(reward, batch.correct, batch.group, batch.scorable)
    out["reward/beyond_correct_frac"] = beyond, ~beyond.isnan()


def _groups(out: Measured, batch: Batch, prepared: Prepared) -> None:
    ids, index = batch.group.unique(return_inverse=True)

    def per_group(rows: Tensor) -> Tensor:
        return torch.zeros_like(ids).index_add(0, index, rows.to(ids.dtype))

    size, right = per_group(batch.scorable), per_group(batch.correct & batch.scorable)
    moved = per_group((prepared.advantage != 0).any(1))
    seen = size > 0
    out["group/count"] = seen.sum(), seen.sum()
    out.mean("group/live_frac", (right > 0) & (right < size), seen)
    out.mean("group/all_right_frac", right == size, seen)
    out.mean("group/all_wrong_frac", right == 0, seen)
    out.mean("group/zero_advantage_frac", moved == 0, seen)
    out["group/size_min"] = torch.where(seen, size, len(batch)).amin(), seen.sum()
    out.largest("group/size_max", size, seen)


def _lengths(out: Measured, batch: Batch) -> None:
    everything = torch.ones_like(batch.scorable)
    out.mean("length/mean", batch.completion_len, everything)
    out.largest("length/max", batch.completion_len, everything)
    out.mean("length/right_mean", batch.completion_len, batch.scorable & batch.correct)
    out.mean("length/wrong_mean", batch.completion_len, batch.scorable & ~batch.correct)
    out.mean("length/truncated_frac", batch.truncated, everything)


def _advantages(out: Measured, view: TokenView) -> None:
    out.mean("advantage/mean", view.advantage, view.mask)
    out.std("advantage/std", view.advantage, view.mask)
    out.largest("advantage/abs_max", view.advantage.abs(), view.mask)
    out.mean("advantage/positive_frac", view.advantage > 0, view.mask)


def _policy(out: Measured, view: TokenView, clipped: Bool[Tensor, "B T"]) -> None:
    out.mean("policy/entropy_nats", view.entropy, view.mask)
    out.mean("policy/logp_mean_nats", view.logp, view.mask)
    out.mean("policy/clip_frac", clipped, view.mask)


def _staleness(out: Measured, view: TokenView) -> None:
    out.mean("policy/log_ratio_mean_nats", view.log_ratio, view.mask)
    out.largest("policy/log_ratio_max_abs", view.log_ratio.abs(), view.mask)
    out.mean("policy/off_policy_frac", ~(view.log_ratio.abs() <= OFF_POLICY_NATS), view.mask)
    out.mean("policy/old_kl_nats", k3(-view.log_ratio), view.mask)


def _gap(out: Measured, view: TokenView, batch: Batch) -> None:
    out.mean("gap/mean_nats", view.gap, view.mask)
    out.largest("gap/max_abs_nats", view.gap.abs(), view.mask)
    out.mean("gap/k3_nats", k3(-view.gap), view.mask)
    out.mean("gap/weight_mean", view.gap.exp(), view.mask)
    count, completions = view.mask.sum(), view.mask.any(1)
    out["gap/chi2"] = gap.chi_square(view.gap, view.mask), count
    out["gap/outside_frac"] = gap.outside_frac(view.gap, view.mask), count
    out.mean("gap/positive_frac", view.gap > 0, view.mask & (view.gap != 0))
    out["gap/pearson"] = gap.pearson(view.gap + keep(batch.logp_rollout, view.mask), batch.logp_rollout, view.mask)
    out["gap/ess_frac"] = gap.ess_frac(view.gap, view.mask), count
    whole = gap.sequence_log_weight(view.gap, view.mask)
    out["gap/sequence_ess_frac"] = gap.ess_frac(whole, completions), completions.sum()
    out.largest("gap/sequence_max_abs_nats", whole.abs(), completions)


def _corrected(out: Measured, logp: Tensor, entropy: Tensor, batch: Batch, prepared: Prepared, objective: Objective) -> None:
    """What the corrections do to the tokens of scorable completions, those that leave the denominators included."""
    everyone = batch.mask & batch.scorable[:, None]
    view = objective.view(logp, entropy, batch, replace(prepared, mask=everyone))
    accepts = everyone.clone()
    for correction in objective.corrections:
        accepts &= correction(view) > 0
    out.mean("gap/rejected_frac", ~accepts, everyone)
    out.mean("gap/rejected_completions_frac", ~accepts.any(1), everyone.any(1))
    out.mean("gap/correction_mean", weight(objective.corrections, view), view.mask & (view.advantage != 0))


@torch.no_grad()
def measure_routing(batch: Batch, prepared: Prepared, experts: Int[Tensor, "B L layers k"], number: int) -> dict[str, float]:
    """What can be said of a step's routing: the family moe.

    Args:
        batch: of the whole step; `experts` (replayed), `experts_rollout` and `experts_old` are compared where they are there.
        experts: that every token would have gone to by itself in the step.
        number: of experts in a layer.
    """
    out, mask = Measured(), prepared.mask
    now = routing.at_predictions(experts, batch)
    told = {
        name: routing.at_predictions(value, batch)
        for name in ("experts", "experts_rollout", "experts_old")
        if (value := getattr(batch, name)) is not None
    }
    if "experts_rollout" in told:
        trainer = told.get("experts_old", now)
        out["moe/layers_differ_frac"], out["moe/tokens_differ_frac"] = routing.differing_fracs(
            trainer, told["experts_rollout"], mask
        )
    if "experts_old" in told:
        out["moe/layers_moved_frac"], out["moe/tokens_moved_frac"] = routing.differing_fracs(now, told["experts_old"], mask)
    if "experts" in told:
        out.mean("moe/replayed_frac", (told["experts"] >= 0).all(-1).all(-1), mask)
    load = routing.loads(now, mask, number)
    out["moe/load_max"] = load.amax(-1).mean() * number, mask.sum()
    out["moe/idle_frac"] = (load == 0).double().mean(), mask.sum()
    return out.numbers()


def _reference(out: Measured, view: TokenView) -> None:
    if view.ref_log_ratio is None:
        return
    out.mean("kl/ref_k1_nats", view.ref_log_ratio, view.mask)
    out.mean("kl/ref_k3_nats", k3(view.ref_log_ratio), view.mask)
    out.largest("kl/ref_max_abs_nats", view.ref_log_ratio.abs(), view.mask)
