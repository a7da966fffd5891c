"""What a step does to weights: which move and by how much, at which rate, what is skipped, and what a checkpoint keeps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.formulas import AdamW, rate_by_hand
from keel.doctor.probes.forward import unsteady
from keel.doctor.subject import ALIKE, Subject, apart, some_differ
from keel.training import checkpoint, loop
from keel.types import Batch

Vector = Float[Tensor, " n"]
WATCHED = 2e6  # numbers, of the smallest tensors, that are held against the optimizer's formula


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


def census(subject: Subject) -> Check:
    """Two real steps: every tensor that should train gets a gradient, and its stored bits change."""
    if (skip := subject.blocked("census", "advantage", "gradient")) is not None:
        return skip
    if (why := _no_choice(subject)) is not None:
        return Check("census", "", skipped=why)
    trainer, batch = subject.trainer, subject.batch
    left_out = [name for name, p in subject.policy.model.named_parameters() if not p.requires_grad]
    findings = []
    if left_out and subject.config.lora is None:
        says = f"{len(left_out)} tensors are not trained, {left_out[0]} among them, and no adapters are asked for"
        findings.append(Finding(fault("K153"), says, float(len(left_out)), 0.0, evidence={"tensors": left_out[:20]}))
    with subject.kept():
        start = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        told: dict[str, bool] = dict.fromkeys(start, False)
        watched = _smallest(start, WATCHED)
        by_hand = AdamW(trainer.config.train, {name: start[name] for name in watched})
        for _ in range(2):
            step = subject.gradient(batch)
            for name, gradient in step.gradient.items():
                told[name] |= gradient is not None and bool(gradient.any())
            expected = by_hand.step(step.gradient, float(step.metrics["train/lr"]))
            loop._update(trainer, batch, trainer.objective.prepare(batch, subject.cap))
        begun, ended = (_flat({name: tensors[name] for name in watched}) for tensors in (start, trainer.parameters))
        off = apart(ended - begun, expected - begun)
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
    floor = _rounding_of_steps({name: start[name] for name in watched}, expected - begun)
    if not findings and off > floor:
        says = f"after two steps weights are {off:.1e} of the way from where AdamW's formula takes them; rounding is {floor:.1e}"
        findings.append(Finding(fault("K124"), says, off, floor))
    findings += _of_the_rate(subject, after)
    changed = sum(share for share in moved.values()) / len(moved)
    says = f"all {len(moved)} trained tensors get a gradient, and {changed:.1%} of their numbers change in two steps"
    return Check("census", findings[0].says if findings else says, tuple(findings))


def _no_choice(subject: Subject) -> str | None:
    """Why no weight can matter to this batch; None where one can."""
    batch = subject.batch
    mask = subject.trainer.objective.prepare(batch, subject.cap).mask
    if batch.kept is not None and not ((batch.kept.sum(-1) > 1) & mask).any():
        return "truncated sampling left one token everywhere, so no weight can matter"
    return None if some_differ(batch) else ALIKE


def _flat(tensors: Mapping[str, Tensor]) -> Vector:
    return torch.cat([t.detach().double().flatten() for t in tensors.values()])


def _smallest(tensors: Mapping[str, Tensor], most: float) -> list[str]:
    """As many of them, the smallest first, as have so many numbers together."""
    names = sorted(tensors, key=lambda name: tensors[name].numel())
    sizes = accumulate(tensors[name].numel() for name in names)
    return [name for name, size in zip(names, sizes, strict=True) if size <= most] or names[:1]


def _rounding_of_steps(start: Mapping[str, Tensor], way: Vector) -> float:
    """How far rounding of stored weights may take them off their way, as a share of it."""
    stored = torch.cat([(t.detach().double().abs() * _spacing(t)).flatten() for t in start.values()])
    return 1e-3 + 2 * float(stored.norm() / way.norm().clamp(min=1e-300))


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
    taken, reference = trainer.stream.taken, trainer.reference
    with subject.kept(), tempfile.TemporaryDirectory() as folder:
        loop._update(trainer, batch, trainer.objective.prepare(batch, subject.cap))
        tensors, clocks = trainer.state()
        checkpoint.save(Path(folder), trainer.step, tensors, {"clocks": clocks})
        on = _after_one_more(subject, batch)
        _, tensors, state = checkpoint.load(Path(folder))
        trainer.optimizer.state.clear()
        trainer.restore(tensors, state["clocks"])
        restored = trainer.state()[1]
        before, after = batch.logp_ref, loop._with_log_probabilities(trainer, replace(batch, logp_ref=None)).logp_ref
        again = _after_one_more(subject, batch)
    trainer.stream.taken, trainer.reference = taken, reference
    subject.awake()
    differ = [name for name in on if not torch.equal(on[name], again[name])]
    late = [name for name in clocks if restored.get(name) != clocks[name]]
    if late:
        says = f"after resuming {late[0]} is {restored.get(late[0])}, and was {clocks[late[0]]}"
    elif differ:
        says = f"a step after resuming gives other bits in {len(differ)} of {len(on)} tensors, {differ[0]} among them"
    elif before is not None and not torch.equal(before[batch.mask], after[batch.mask]):
        says = f"after resuming the reference is another, by up to {float((before - after)[batch.mask].abs().max()):.2g} nats"
        return Check("resume", says, (Finding(fault("K170"), says, 1.0, 0.0),))
    else:
        return Check("resume", "a step after resuming gives the same bits as without, and every clock stands where it stood")
    return Check("resume", says, (Finding(fault("K170"), says, float(len(differ) + len(late)), 0.0),))


def _after_one_more(subject: Subject, batch: Batch) -> dict[str, Tensor]:
    loop._update(subject.trainer, batch, subject.trainer.objective.prepare(batch, subject.cap))
    return {name: p.detach().clone() for name, p in subject.trainer.parameters.items()}
