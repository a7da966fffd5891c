"""The real optimizer step: cut otherwise, in another order, with junk under the mask, with what is not finite, and undone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.formulas import AdamW, rate_by_hand
from keel.doctor.probes.forward import unsteady, widened
from keel.doctor.subject import Subject, apart, in_double, some_differ
from keel.training import checkpoint, loop
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


def non_finite(subject: Subject) -> Check:
    """An advantage that is NaN: no weight, no optimizer state and no clock of the schedule may move."""
    if (skip := subject.blocked("non-finite gradient", "gradient")) is not None:
        return skip
    trainer, batch = subject.trainer, subject.batch
    prepared = trainer.objective.prepare(batch, subject.cap)
    spoiled = replace(prepared, advantage=torch.where(prepared.mask, torch.nan, prepared.advantage))
    with subject.kept():
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        updates = trainer.updates
        loop._update(trainer, batch, spoiled)
        moved = [name for name, p in trainer.parameters.items() if not torch.equal(p.detach(), before[name])]
        counted = trainer.updates != updates
    if not moved and not counted:
        return Check("non-finite gradient", "a gradient that is not finite changes no weight")
    what = f"{len(moved)} tensors, {moved[0]} among them," if moved else "the schedule's clock"
    says = f"a gradient that is not finite changed {what} in place of being skipped"
    return Check("non-finite gradient", says, (Finding(fault("K131"), says, float(len(moved)), 0.0),))


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


def census(subject: Subject) -> Check:
    """Two real steps: every tensor that should train gets a gradient, and its stored bits change."""
    if (skip := subject.blocked("census", "advantage", "gradient")) is not None:
        return skip
    trainer, batch = subject.trainer, subject.batch
    mask = trainer.objective.prepare(batch, subject.cap).mask
    if batch.kept is not None and not ((batch.kept.sum(-1) > 1) & mask).any():
        return Check(
            "census", "no token was a choice", skipped="truncated sampling left one token everywhere: no weight can matter"
        )
    if not some_differ(batch):
        return Check("census", "", skipped="in no group there are two different completions, so no weight can matter")
    left_out = [name for name, p in subject.policy.model.named_parameters() if not p.requires_grad]
    findings = []
    if left_out and subject.config.lora is None:
        says = f"{len(left_out)} tensors are not trained, {left_out[0]} among them, and no adapters are asked for"
        findings.append(Finding(fault("K153"), says, float(len(left_out)), 0.0, evidence={"tensors": left_out[:20]}))
    with subject.kept():
        start = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        told: dict[str, bool] = dict.fromkeys(start, False)
        by_hand = AdamW(trainer.config.train, trainer.parameters)
        for _ in range(2):
            step = subject.gradient(batch)
            for name, gradient in step.gradient.items():
                told[name] |= gradient is not None and bool(gradient.any())
            expected = by_hand.step(step.gradient, float(step.metrics["train/lr"]))
            loop._update(trainer, batch, trainer.objective.prepare(batch, subject.cap))
            off = apart(_flat(trainer.parameters) - _flat(start), expected - _flat(start))
        after = float(subject.look(batch)[batch.mask].mean())
        moved = {name: float((p.detach() != start[name]).double().mean()) for name, p in trainer.parameters.items()}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    unheld = [name for name, p in trainer.parameters.items() if id(p) not in held]
    silent = [name for name, seen in told.items() if not seen]
    still = [name for name, share in moved.items() if share == 0.0 and name not in silent and name not in unheld]
    if unheld:
        says = f"the optimizer does not hold {len(unheld)} of {len(told)} tensors that should train, {unheld[0]} among them"
        findings.append(Finding(fault("K153"), says, float(len(unheld)), 0.0, evidence={"tensors": unheld[:20]}))
    if silent:
        says = f"{len(silent)} of {len(told)} trained tensors get no gradient, {silent[0]} among them"
        findings.append(Finding(fault("K153"), says, float(len(silent)), 0.0, evidence={"tensors": silent[:20]}))
    if still:
        findings.append(_unmoved(subject, still, moved))
    if not findings and off > (floor := _rounding_of_steps(start, expected)):
        says = f"after two steps weights are {off:.1e} of the way from where AdamW's formula takes them; rounding is {floor:.1e}"
        findings.append(Finding(fault("K124"), says, off, floor))
    findings += _of_the_rate(subject, after)
    changed = sum(share for share in moved.values()) / len(moved)
    says = f"all {len(moved)} trained tensors get a gradient, and {changed:.1%} of their numbers change in two steps"
    return Check("census", findings[0].says if findings else says, tuple(findings))


def _flat(tensors: Mapping[str, Tensor]) -> Vector:
    return torch.cat([t.detach().double().flatten() for t in tensors.values()])


def _rounding_of_steps(start: Mapping[str, Tensor], expected: Vector) -> float:
    """How far rounding of stored weights may take them off their way, as a share of it."""
    stored = torch.cat([(t.detach().double().abs() * _spacing(t)).flatten() for t in start.values()])
    return 1e-3 + 2 * float(stored.norm() / (expected - _flat(start)).norm().clamp(min=1e-300))


def schedule(subject: Subject) -> Check:
    """The learning rate that a step takes at the beginning, in the middle and at the end of the run, against the formula."""
    if (skip := subject.blocked("schedule", "gradient")) is not None:
        return skip
    train, steps, trainer = subject.config.train, subject.config.steps, subject.trainer
    held, told = trainer.updates, {}
    for clock in sorted({0, steps // 2, steps - 1}):
        trainer.updates = clock
        told[clock] = float(subject.gradient(subject.batch).metrics["train/lr"])
    trainer.updates = held
    off = {
        clock: (rate, due)
        for clock, rate in told.items()
        if abs(rate - (due := rate_by_hand(train, clock, steps))) > 1e-6 * train.lr
    }
    if not off:
        rates = ", ".join(f"{rate:.3g}" for rate in told.values())
        return Check("schedule", f"at the beginning, in the middle and at the end the learning rate is the schedule's: {rates}")
    clock, (rate, due) = next(iter(off.items()))
    says = f"after {clock} of {steps} updates the learning rate is {rate:.3g}, and by the schedule {due:.3g}"
    return Check("schedule", says, (Finding(fault("K126"), says, rate, due),))


def _of_the_rate(subject: Subject, after: float) -> list[Finding]:
    """Whether two steps leave a policy that knows less of what it said than a uniform guess does."""
    guess = -math.log(subject.policy.base.get_output_embeddings().weight.shape[0])
    before = float(subject.seen[subject.batch.mask].mean())
    if not after < guess <= before:
        return []
    says = (
        f"two steps at learning rate {subject.config.train.lr:g} throw the policy away: of its own samples it says {after:.1f} "
        f"nats a token, before {before:.2f}; a guess among all tokens says {guess:.1f}"
    )
    return [Finding(fault("K654"), says, after, guess)]


def _unmoved(subject: Subject, still: list[str], moved: dict[str, float]) -> Finding:
    parameters, lr = subject.trainer.parameters, subject.config.train.lr
    ulp = {name: float(parameters[name].detach().abs().mean()) * _spacing(parameters[name]) for name in still}
    name = max(ulp, key=ulp.__getitem__)
    says = (
        f"{len(still)} of {len(moved)} tensors get a gradient and keep every stored bit through two steps at learning rate {lr:g}: "
        f"the numbers of {name} are {ulp[name]:.1e} apart"
    )
    return Finding(fault("K653"), says, float(len(still)), 0.0, evidence={"tensors": still[:20]})


def _spacing(p: Tensor) -> float:
    """Distance of neighbouring numbers near 1 in what is really stored: bits that are all zero do not count."""
    rounded = torch.equal(p.detach().to(torch.bfloat16).to(p.dtype), p.detach())
    return torch.finfo(torch.bfloat16 if rounded else p.dtype).eps


def resumes(subject: Subject) -> Check:
    """A step, a checkpoint, another step; and from the checkpoint again: the same bits."""
    if (skip := unsteady(subject, "resume") or subject.blocked("resume", "gradient")) is not None:
        return skip
    trainer, batch = subject.trainer, subject.batch
    taken = trainer.stream.taken
    with subject.kept(), tempfile.TemporaryDirectory() as folder:
        loop._update(trainer, batch, trainer.objective.prepare(batch, subject.cap))
        tensors, clocks = trainer.state()
        checkpoint.save(Path(folder), trainer.step, tensors, {"clocks": clocks})
        on = _after_one_more(subject, batch)
        _, tensors, state = checkpoint.load(Path(folder))
        trainer.optimizer.state.clear()
        trainer.restore(tensors, state["clocks"])
        restored = trainer.state()[1]
        again = _after_one_more(subject, batch)
    trainer.stream.taken = taken
    subject.awake()
    differ = [name for name in on if not torch.equal(on[name], again[name])]
    late = [name for name in clocks if restored.get(name) != clocks[name]]
    if late:
        says = f"after resuming {late[0]} is {restored.get(late[0])}, and was {clocks[late[0]]}"
    elif differ:
        says = f"a step after resuming gives other bits in {len(differ)} of {len(on)} tensors, {differ[0]} among them"
    else:
        return Check("resume", "a step after resuming gives the same bits as without, and every clock stands where it stood")
    return Check("resume", says, (Finding(fault("K170"), says, float(len(differ) + len(late)), 0.0),))


def _after_one_more(subject: Subject, batch: Batch) -> dict[str, Tensor]:
    loop._update(subject.trainer, batch, subject.trainer.objective.prepare(batch, subject.cap))
    return {name: p.detach().clone() for name, p in subject.trainer.parameters.items()}


def _same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return all((a[n] is None) == (b[n] is None) and (a[n] is None or torch.equal(a[n], b[n])) for n in b)
