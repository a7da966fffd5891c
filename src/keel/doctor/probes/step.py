"""The gradient of the real step: again, cut otherwise, in another order, with junk under the mask; and updates of one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import unsteady, widened
from keel.doctor.subject import Subject, apart, in_double
from keel.training import loop
from keel.training.batch import micro_batches
from keel.types import Batch

Vector = Float[Tensor, " n"]
ROUNDING = 1e-5  # of a gradient's norm, where 32-bit sums are taken in another order


def again(subject: Subject) -> Check:
    """One batch several times over: one optimizer step each, the same gradient, and nothing left of it afterwards."""
    if (skip := unsteady(subject, "again")) is not None:
        return skip
    steps = [subject.gradient(subject.stale) for _ in range(2 if subject.large else 3)]
    lost = [step for step in steps if not step.skipped and (step.taken != 1 or all(g is None for g in step.gradient.values()))]
    left = steps[0].left
    off = max(apart(step.flat, steps[0].flat) for step in steps[1:])
    if lost:
        code, says = (
            "K123",
            f"of {len(steps)} updates with one batch {len(lost)} took {lost[0].taken} optimizer steps, and 1 was due",
        )
    elif left:
        code, says = (
            "K102",
            f"after a step {len(left)} tensors still have its gradient, {left[0]} among them, and the next adds to it",
        )
    elif off > ROUNDING and not any(step.skipped for step in steps):
        code, says = (
            "K145",
            f"the gradient of one batch differs by {off:.1e} of its norm when it is taken again, with the same weights",
        )
    else:
        return Check("again", f"{len(steps)} times the same batch is one optimizer step each, with the same gradient")
    subject.block("gradient", "one batch has not one gradient; see again")
    return Check("again", says, (Finding(fault(code), says, off, ROUNDING),))


def cuts(subject: Subject) -> Check:
    """One stored batch in micro-batches of several sizes, and over virtual ranks: the same gradient."""
    if (skip := unsteady(subject, "cuts") or subject.no_double("cuts") or subject.blocked("cuts", "gradient")) is not None:
        return skip
    narrow = subject.gradient(subject.stale).flat
    with subject.double():
        wide = in_double(subject.stale)
        whole, one_rank = subject.gradient(wide), _over_ranks(subject, wide, 1)
        tokens = int((wide.prompt_len + wide.completion_len).sum())
        differ, parts = {}, {}
        for share in (len(wide),) if subject.large else (3, len(wide)):
            parts[share] = subject.gradient(wide, micro_batch_tokens=max(1, tokens // share))
            differ[f"micro-batches of {max(1, tokens // share)} tokens"] = apart(parts[share].flat, whole.flat)
        ranks = {n: _over_ranks(subject, wide, n) for n in ((2,) if subject.large else (2, 3))}
        told = {f"{n} virtual ranks": apart(vector, one_rank) for n, vector in ranks.items()}
        end, prepared = micro_batches(wide, max(1, tokens // len(wide)))[-1], subject.trainer.objective.prepare(wide, subject.cap)
        last = subject.gradient(wide.rows(end), prepared.rows(end))
    floor = apart(narrow, whole.flat)
    name, largest = max((differ | told).items(), key=lambda each: each[1])
    says = f"cut otherwise, the gradient differs by {largest:.1e} of its norm in 64 bits ({name}); rounding in 32 is {floor:.1e}"
    if largest <= floor:
        return Check("cuts", says)
    by_micro = max(differ.values()) > floor
    code = _kind_of_cut(whole.flat, parts[len(wide)].flat, last.flat) if by_micro else "K103"
    return Check("cuts", says, (Finding(fault(code), says, largest, floor, evidence=differ | told),))


def _kind_of_cut(whole: Vector, singles: Vector, last: Vector) -> str:
    """Whether the gradient of single rows has only another scale, is that of the last cut alone, or lacks that one; or is another
    one altogether.
    """
    scaled, only, without = parallel(singles, whole), parallel(singles, last), parallel(whole - singles, last)
    return "K102" if scaled or only or without or float(singles.norm()) == 0.0 else "K101"


def parallel(a: Vector, b: Vector) -> bool:
    """Whether two vectors point the same way, or against each other."""
    return abs(float(a @ b)) > (1 - 1e-6) * float(a.norm() * b.norm()) > 0


def _over_ranks(subject: Subject, batch: Batch, ranks: int) -> Vector:
    """Each rank has some of the rows and the counts of all of them; the gradients add up."""
    trainer, objective = subject.trainer, subject.trainer.objective
    prepared = objective.prepare(batch, subject.cap)
    counts = objective.counts(batch, prepared, subject.cap)
    subject.policy.model.zero_grad(set_to_none=True)
    for rank in range(ranks):
        rows = torch.arange(rank, len(batch), ranks)
        whole = [torch.arange(len(rows))]
        part = batch.rows(rows), prepared.rows(rows), counts
        loop.accumulate_gradient(subject.policy, objective, *part, whole, subject.sampling.temperature)
    found = [p.grad.double().flatten() for p in trainer.parameters.values() if p.grad is not None]
    subject.policy.model.zero_grad(set_to_none=True)
    return torch.cat(found) if found else torch.zeros(1, dtype=torch.float64)


def order(subject: Subject) -> Check:
    """Rows in another order, and more padding with junk in it: the same gradient."""
    if (skip := unsteady(subject, "order") or subject.no_double("order") or subject.blocked("order", "gradient")) is not None:
        return skip
    narrow = subject.gradient(subject.stale).flat
    with subject.double():
        wide = in_double(subject.stale)
        whole = subject.gradient(wide).flat
        turned = torch.randperm(len(wide), generator=torch.Generator().manual_seed(1))
        differ = {
            "rows in another order": apart(subject.gradient(wide.rows(turned)).flat, whole),
            "seven more columns of padding": apart(subject.gradient(widened(wide, 7)).flat, whole),
        }
    floor = apart(narrow, whole)
    name, largest = max(differ.items(), key=lambda each: each[1])
    says = f"{name} change the gradient by {largest:.1e} of its norm in 64 bits; 32-bit rounding is {floor:.1e}"
    if largest <= floor:
        return Check("order", says)
    code = "K135" if differ["rows in another order"] > floor else "K116"
    return Check("order", says, (Finding(fault(code), says, largest, floor, evidence=differ),))


def masked(subject: Subject) -> Check:
    """Junk under the mask, another reward for what could not be scored, and its rows left out altogether: nothing may change."""
    if (skip := unsteady(subject, "masked") or subject.blocked("masked", "gradient")) is not None:
        return skip
    batch, findings = subject.stale, []
    plain = subject.gradient(batch)
    if plain.skipped:
        says = f"completions without a verdict make the gradient of {plain.skipped} not finite"
        subject.block("advantage", f"{says}; see masked")
        subject.block("gradient", f"{says}; see masked")
        return Check("masked", says, (Finding(fault("K116"), says, float("inf"), 0.0),))
    for junk in (torch.nan, torch.inf, 99.0):
        step = subject.gradient(_spoiled(batch, junk))
        if not _same(step.gradient, plain.gradient):
            says = f"{junk:g} under the mask changes the gradient" + (
                f" (tensor {step.skipped} is not finite)" if step.skipped else ""
            )
            findings.append(Finding(fault("K116"), says, float("inf"), 0.0))
            break
    gone = ~batch.scorable
    if not findings and bool(gone.any()):
        findings += _without(subject, batch, gone, plain.flat)
    says = "what is masked, or could not be scored, changes no bit of the gradient"
    return Check("masked", findings[0].says if findings else says, tuple(findings))


def _without(subject: Subject, batch: Batch, gone: Tensor, plain: Vector) -> list[Finding]:
    """Findings where rows without a verdict have a say in the gradient of the others."""
    if subject.no_double("masked") is not None:
        return []
    with subject.double():
        wide = in_double(batch)
        whole = subject.gradient(wide).flat
        fewer = wide.rows((~gone).nonzero()[:, 0])
        left, objective = subject.gradient(fewer).flat, subject.trainer.objective
        prepared = objective.prepare(wide, subject.cap)
        counted = objective.counts(wide, prepared, subject.cap)
    floor, differs = apart(plain, whole), apart(left, whole)
    if differs <= floor:
        return []
    subject.block("advantage", "completions without a verdict change the others' gradient; see masked")
    tokens, trained = int(counted.tokens), int(prepared.mask.sum())
    denominators = tokens != trained
    code = "K121" if denominators else "K115"
    what = (
        f"denominators count {tokens} tokens where {trained} are trained" if denominators else "their siblings' advantages change"
    )
    says = f"leaving out {int(gone.sum())} unscorable completions changes the gradient by {differs:.1e} of its norm: {what}"
    return [Finding(fault(code), says, differs, floor)]


def _spoiled(batch: Batch, junk: float) -> Batch:
    names = [name for name in ("logp_rollout", "logp_old", "logp_ref") if getattr(batch, name) is not None]
    changes = {name: torch.where(batch.mask, getattr(batch, name), junk) for name in names}
    return replace(batch, **changes)


def updates(subject: Subject) -> Check:
    """Several updates of one batch: each row once, and the ratio against the policy that sampled."""
    trainer, batch = subject.trainer, subject.stale
    number = max(2, trainer.updates_per_batch if trainer.updates_per_batch <= len(batch.group.unique()) else 2)
    rows = torch.cat(loop._updates(batch, number)).sort().values
    findings = []
    if not torch.equal(rows, torch.arange(len(batch))):
        extra = len(batch) - len(rows.unique())
        says = f"cut into {number} updates, {extra} of {len(batch)} completions are left out and others come twice"
        findings.append(Finding(fault("K123"), says, float(extra), 0.0))
    told = subject.gradient(batch).metrics
    expected = float((subject.seen - batch.logp_old)[batch.mask].abs().max())
    found = told.get("policy/log_ratio_max_abs", 0.0)
    if not found > 0.5 * expected:
        says = (
            f"the policy stands up to {expected:.2g} nats from the one that sampled, and the loss sees a log-ratio of {found:.2g}"
        )
        findings.append(Finding(fault("K122"), says, found, expected))
    says = f"cut into {number} updates every completion comes once, and the ratio is taken against the policy that sampled"
    return Check("updates", findings[0].says if findings else says, tuple(findings))


def _same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return all((a[n] is None) == (b[n] is None) and (a[n] is None or torch.equal(a[n], b[n])) for n in b)
