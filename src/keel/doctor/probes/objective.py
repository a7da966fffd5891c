"""The objective on rewards whose answer is known: advantages, the direction of the gradient, the reference and its KL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.formulas import ESTIMATORS, advantages_by_hand, kl_by_hand, known, weight_by_hand
from keel.doctor.probes.forward import unsteady
from keel.doctor.subject import ALIKE, Step, Subject, apart, in_double, some_differ
from keel.objectives.advantages import group_mean, sibling_mean
from keel.objectives.kl import k1
from keel.objectives.objective import Objective
from keel.training import loop
from keel.types import Batch

ROUNDING = 1e-5  # of a mean of a few 32-bit numbers of size 1


def advantages(subject: Subject) -> Check:
    """Right above wrong in every group, groups centred where the recipe centres them, equal rewards without any advantage."""
    if (skip := subject.blocked("advantages", "advantage")) is not None:
        return skip
    objective, batch = subject.trainer.objective, subject.batch
    plain = replace(objective, shaping=(), reward_kl=None, corrections=())
    findings = []
    table = plain.prepare(batch, subject.cap)
    per_row = table.advantage.sum(1) / table.mask.sum(1).clamp(min=1)
    trained = batch.scorable & table.mask.any(1)
    upside_down = _groups_where(batch, trained, lambda rows: _not_above(per_row[rows], batch.correct[rows]))
    if upside_down:
        says = f"in {upside_down} groups a wrong completion has at least the advantage of a right one"
        findings.append(Finding(fault("K125"), says, float(upside_down), 0.0))
    elif getattr(objective.advantage, "baseline", None) in (group_mean, sibling_mean) and _scales_by_row(objective):
        off = _groups_where(batch, trained, lambda rows: abs(float(per_row[rows].sum())) > ROUNDING * len(rows))
        if off:
            says = f"advantages of {off} groups do not add up to 0, though the recipe's baseline is the group's own mean"
            findings.append(Finding(fault("K125"), says, float(off), 0.0))
    if not findings:
        findings += _of_equal_rewards(subject, plain, batch)
    if findings:
        subject.block("advantage", "advantages are wrong; see there")
    says = "right completions stand above wrong ones in every group, and equal rewards give no advantage"
    return Check("advantages", findings[0].says if findings else says, tuple(findings))


def _scales_by_row(objective) -> bool:
    """Whether the scale multiplies whole groups, so that a group's sum stays 0."""
    return type(objective.advantage.scale).__name__ not in ("TokenWhitening",)


def _groups_where(batch: Batch, trained: Tensor, wrong) -> int:
    found = 0
    for group in batch.group.unique():
        rows = ((batch.group == group) & trained).nonzero()[:, 0]
        found += len(rows) > 1 and bool(wrong(rows))
    return found


def _not_above(advantage: Float[Tensor, " n"], correct: Tensor) -> bool:
    return bool(correct.any() and not correct.all() and advantage[correct].min() <= advantage[~correct].max())


def _of_equal_rewards(subject: Subject, objective, batch: Batch) -> list[Finding]:
    """In every group one number for all, as a float that has no exact form; only where a group is compared with itself."""
    if getattr(objective.advantage, "baseline", None) not in (group_mean, sibling_mean):
        return []
    worth = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.0, 0.0, 3.3])[batch.group % 7]
    equal = replace(batch, reward=torch.where(batch.scorable, worth, torch.nan))
    largest = float(objective.prepare(equal, subject.cap).advantage.abs().max())
    whitened = not _scales_by_row(objective)
    if largest <= (1.0 if whitened else ROUNDING):
        return []
    says = f"groups whose completions all earn the same have advantages of up to {largest:.2g}"
    return [Finding(fault("K128"), says, largest, 0.0)]


def formula(subject: Subject) -> Check:
    """Advantages of rewards of many sizes, what shaping and a KL take off them, and the weight of each token in the loss at ratios
    away from 1: against the recipe's formulas in 64 bits.
    """
    if (skip := subject.blocked("formula", "advantage")) is not None:
        return skip
    objective, batch = replace(subject.trainer.objective, corrections=()), _of_many_sizes(subject)
    if not known(objective):
        return Check("formula", "", skipped="the recipe has advantages of its own making, whose formula is not known here")
    steps = (
        ("K125", "advantages are", replace(objective, reward_kl=None, shaping=())),
        ("K129", "with shaped rewards advantages are", replace(objective, reward_kl=None)),
        ("", "with the KL that is taken off the reward advantages are", objective),
    )
    for code, what, part in steps:
        if (off := _off(part, batch)) > ROUNDING:
            subject.block("advantage", "advantages are wrong; see formula")
            code, why = (code, "") if code else _kind_of_kl(objective, batch)
            says = f"{what} up to {off:.2g} off the recipe's formula{why}"
            return Check("formula", says, (Finding(fault(code), says, off, ROUNDING),))
    says = f"advantages are within {off:.1e} of the recipe's formula"
    if (off := _off_in_the_loss(objective, batch)) is None:
        return Check("formula", says)
    if off <= ROUNDING:
        says = f"{says}, and weights of tokens in the loss within {off:.1e}"
        return Check("formula", says, tuple(_of_the_bonus(objective, batch)))
    says = f"away from a ratio of 1, weights of tokens in the loss are up to {off:.2g} off the recipe's formula"
    return Check("formula", says, (Finding(fault("K127"), says, off, ROUNDING),))


def _of_many_sizes(subject: Subject) -> Batch:
    """The stale batch with rewards of many sizes, every third completion cut off, and ratios on both sides of any clip."""
    batch, generator = subject.stale, torch.Generator().manual_seed(subject.config.seed)
    worth = torch.rand(len(batch), generator=generator).to(batch.reward.dtype)
    old = batch.logp_old + 0.5 * torch.randn(batch.mask.shape, generator=generator).to(batch.logp_old.dtype)
    changes = {"reward": torch.where(batch.scorable, worth, torch.nan), "truncated": torch.arange(len(batch)) % 3 == 0}
    return replace(batch, logp_old=old, **changes)


def _off(objective: Objective, batch: Batch, times: float = 1.0) -> float:
    """The largest difference to the formula, of advantages of about size 1."""
    cap = batch.mask.shape[1]
    expected, found = advantages_by_hand(objective, batch, cap, times), objective.prepare(batch, cap).advantage
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _kind_of_kl(objective: Objective, batch: Batch) -> tuple[str, str]:
    """Whether the KL in the reward is not paid, is paid out, or is another one, as (code, words)."""
    kinds = {0.0: ("K105", ": it is never taken off"), -1.0: ("K104", ": it has the wrong sign")}
    return next((kind for times, kind in kinds.items() if _off(objective, batch, times) <= ROUNDING), ("K110", ""))


def _off_in_the_loss(objective: Objective, batch: Batch) -> float | None:
    """The largest difference of a token's weight in the loss to the formula; None where that is not known."""
    plain = replace(objective, loss_kl=None, entropy_coef=0.0)
    prepared = plain.prepare(batch, batch.mask.shape[1])
    logp = torch.where(prepared.mask, batch.logp_rollout, 0.0).double().requires_grad_()
    plain.per_token(logp, torch.zeros_like(logp), batch, prepared).sum().backward()
    old, rollout = (torch.where(prepared.mask, seen, 0.0).double() for seen in (batch.logp_old, batch.logp_rollout))
    weight = weight_by_hand(plain, logp.detach() - old, old - rollout, prepared.advantage, prepared.mask)
    if weight is None:
        return None
    expected = torch.where(prepared.mask & (prepared.advantage != 0), -prepared.advantage.double() * weight, 0.0)
    return float((logp.grad - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _of_the_bonus(objective: Objective, batch: Batch) -> Iterator[Finding]:
    """What the loss makes of a nat of entropy: −coefficient on every trained token, nothing elsewhere."""
    plain = replace(objective, loss_kl=None)
    prepared = plain.prepare(batch, batch.mask.shape[1])
    entropy = torch.ones(batch.mask.shape, dtype=torch.float64, requires_grad=True)
    logp = torch.where(prepared.mask, batch.logp_rollout, 0.0).double().requires_grad_()
    (found,) = torch.autograd.grad(plain.per_token(logp, entropy, batch, prepared).sum(), entropy, allow_unused=True)
    found = torch.zeros_like(entropy) if found is None else found
    off = float((found + objective.entropy_coef * prepared.mask).abs().max())
    if off > ROUNDING * max(1.0, abs(objective.entropy_coef)):
        told = f"{float(found[prepared.mask].mean()):.3g}"
        says = f"a nat of entropy changes the loss by {told} on average, and by {-objective.entropy_coef:.3g} in the recipe"
        yield Finding(fault("K127"), says, off, ROUNDING)


def direction(subject: Subject) -> Check:
    """The real step's gradient against the plain policy gradient of the same rewards, taken by hand: it must not point away.

    On one batch, on-policy, with the group's own mean as the baseline. Any recipe's update has a positive product with it.
    """
    if (skip := unsteady(subject, "direction") or subject.blocked("direction", "advantage", "gradient")) is not None:
        return skip
    if not some_differ(subject.batch):
        return Check("direction", "", skipped=ALIKE)
    batch = replace(subject.batch, logp_ref=None if subject.batch.logp_ref is None else subject.seen)
    step = subject.gradient(batch, objective=_without_bonus(subject))
    worth = torch.where(batch.scorable, batch.correct.float(), 0.0)
    count = torch.zeros(int(batch.group.max()) + 1).index_add(0, batch.group, batch.scorable.float())
    mean = torch.zeros_like(count).index_add(0, batch.group, worth) / count.clamp(min=1)
    centred = torch.where(batch.scorable, worth - mean[batch.group], 0.0)
    logp = subject.policy.logp(batch, temperature=subject.sampling.temperature, replay_experts=True).logp
    by_hand = -(torch.where(batch.mask, logp, 0.0) * centred[:, None]).sum()
    ours, known = beside(subject, step, by_hand)
    size = float(ours.norm() * known.norm())
    cosine = float(ours @ known) / size if size > 0 else 0.0
    subject.facts["cosine"] = cosine
    says = f"the step's gradient has cosine {cosine:.2f} with the policy gradient of the same rewards taken by hand"
    if cosine > 0:
        return Check("direction", says)
    return Check("direction", says, (Finding(fault("K125"), says, cosine, 0.0),))


def _without_bonus(subject: Subject) -> Objective:
    """The recipe's objective but for its entropy bonus, which has a direction of its own."""
    return replace(subject.trainer.objective, entropy_coef=0.0)


def beside(subject: Subject, step: Step, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The step's gradient and that of a loss, over the parameters that both reach, each as one vector."""
    names = [name for name, g in step.gradient.items() if g is not None]
    if not names:
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    wanted = torch.autograd.grad(loss, [subject.trainer.parameters[name] for name in names], allow_unused=True)
    both = [
        (step.gradient[n].double().flatten(), w.double().flatten()) for n, w in zip(names, wanted, strict=True) if w is not None
    ]
    return torch.cat([ours for ours, _ in both]), torch.cat([theirs for _, theirs in both])


def reference(subject: Subject) -> Check:
    """Before the first step the reference is the policy, and when the policy moves it stays."""
    batch = subject.batch
    if batch.logp_ref is None:
        return Check("reference", "", skipped="the recipe has no reference")
    if subject.trainer.step or (skip := unsteady(subject, "reference")) is not None:
        return Check("reference", "", skipped="the policy has been trained since" if subject.trainer.step else skip.skipped)
    off = float((subject.seen - batch.logp_ref)[batch.mask].abs().max())
    floor = _rounding(subject)
    says = f"before the first step the reference is {off:.1e} nats from the policy; 32-bit rounding is {floor:.1e}"
    if off <= floor:
        off = _follows(subject, batch)
        if off <= floor:
            return Check("reference", f"{says}, and it stays where it is when weights change")
        says = f"when the policy's weights change, the reference changes too, by up to {off:.2g} nats"
    return Check("reference", says, (Finding(fault("K152"), says, off, floor),))


def _follows(subject: Subject, batch: Batch) -> float:
    """How far the reference moves with the policy, in nats."""
    with subject.kept(), torch.no_grad():
        for p in subject.trainer.parameters.values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(p))
        moved = loop._with_log_probabilities(subject.trainer, replace(batch, logp_ref=None)).logp_ref
    return float((moved - batch.logp_ref)[batch.mask].abs().max())


def kl_gradient(subject: Subject) -> Check:
    """With equal rewards and a policy that has moved, what is left of the gradient must pull towards the reference."""
    objective = subject.trainer.objective
    if objective.loss_kl is None:
        return Check("KL gradient", "", skipped="the recipe has no KL in the loss")
    if (skip := unsteady(subject, "KL gradient") or subject.blocked("KL gradient", "gradient")) is not None:
        return skip
    batch = replace(subject.batch, reward=torch.where(subject.batch.scorable, 1.0, torch.nan), correct=subject.batch.scorable)
    generator = torch.Generator().manual_seed(3)
    moved = subject.seen + 0.3 * torch.randn(subject.seen.shape, generator=generator)
    batch = replace(batch, logp_ref=moved, logp_old=None)
    step = subject.gradient(batch, objective=_without_bonus(subject))
    logp = subject.policy.logp(batch, temperature=subject.sampling.temperature, replay_experts=True).logp
    pull = 0.5 * torch.where(batch.mask, logp - moved, 0.0).square().sum()
    size = float(step.flat.norm())
    if size == 0.0:
        says = "the KL to the reference is in the loss, and changes no gradient"
        return Check("KL gradient", says, (Finding(fault("K105"), says, 0.0, 0.0),))
    ours, known = beside(subject, step, pull)
    cosine = float(ours @ known) / float(ours.norm() * known.norm())
    says = f"with equal rewards the gradient has cosine {cosine:.2f} with the pull towards the reference"
    if cosine <= 0 and objective.loss_kl.estimator is not k1:
        return Check("KL gradient", says, (Finding(fault("K104"), says, cosine, 0.0),))
    return Check("KL gradient", says, tuple(_of_its_size(subject, batch, step)))


def _of_its_size(subject: Subject, batch: Batch, step: Step) -> Iterator[Finding]:
    """The same gradient against that of the recipe's estimate, written down once more: its size counts, not only its direction.

    Only where nothing else is left of the loss, and no ratio multiplies the estimate.
    """
    objective = subject.trainer.objective
    plain = not (objective.corrections or objective.shaping or objective.entropy_coef or objective.reward_kl)
    alone = (
        plain and objective.loss_kl.ratio is None and getattr(objective.advantage, "baseline", None) in (group_mean, sibling_mean)
    )
    mine = objective.loss_kl.estimator in ESTIMATORS and _scales_by_row(objective)
    if not (alone and mine) or subject.no_double("KL gradient") is not None:
        return
    with subject.double():
        wide = in_double(batch)
        told, prepared = subject.gradient(wide), objective.prepare(wide, subject.cap)
        logp = subject.policy.logp(wide, temperature=subject.sampling.temperature, replay_experts=True).logp
        estimate = kl_by_hand(objective.loss_kl, torch.where(prepared.mask, logp - wide.logp_ref, 0.0), prepared.mask)
        loss = objective.aggregate(objective.loss_kl.kl_coef * estimate, prepared, objective.counts(wide, prepared, subject.cap))
        ours, known = beside(subject, told, loss)
    off, floor = apart(ours, known), apart(step.flat, told.flat)
    if off > floor:
        times = float(ours @ known / known.square().sum())
        says = (
            f"the gradient of the KL in the loss is {times:.3g} times that of the recipe's estimate (off by {off:.1e} of its norm)"
        )
        yield Finding(fault("K110"), says, off, floor)


def _rounding(subject: Subject) -> float:
    from keel.doctor.probes.forward import alone

    if "floor" not in subject.facts:
        alone(subject)
    return max(subject.facts.get("floor", 0.0), 1e-7)
