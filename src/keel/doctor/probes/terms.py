"""Terms that stand beside the reward: whether one of them alone decides what the policy becomes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.formulas import rate_by_hand
from keel.doctor.probes.forward import unsteady
from keel.doctor.subject import ALIKE, Subject, some_differ

LEFT = 0.5  # of what the policy knows of its own samples, beyond a uniform guess, must survive the run's weight decay by itself


def decay(subject: Subject) -> Check:
    """What weight decay does to the policy over the whole run, without any gradient."""
    train, trainer, batch = subject.config.train, subject.trainer, subject.batch
    if not train.weight_decay:
        return Check("decay", "", skipped="the recipe has no weight decay")
    if (skip := unsteady(subject, "decay")) is not None:
        return skip
    steps, done = subject.config.steps, trainer.step
    shrunk = math.prod(max(0.0, 1 - rate_by_hand(train, clock, steps) * train.weight_decay) for clock in range(done, steps))
    with subject.kept(), torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.mul_(shrunk)
        after = float(subject.look(batch)[batch.mask].mean())
    before = float(subject.seen[batch.mask].mean())
    guess = -math.log(subject.policy.base.get_output_embeddings().weight.shape[0])
    left = (after - guess) / (before - guess) if before > guess else 1.0
    says = f"weight decay alone takes weights to {shrunk:.2g} of their size in {steps - done} steps, and leaves {left:.0%} of what "
    says += f"the policy knows of its own samples ({before:.2f} nats a token, then {after:.2f}; a uniform guess says {guess:.2f})"
    if left >= LEFT:
        return Check("decay", says)
    return Check("decay", says, (Finding(fault("K656"), says, left, LEFT),))


def bonus(subject: Subject) -> Check:
    """The gradient of the entropy bonus beside that of the rewards, on a batch in which every group has right and wrong answers."""
    objective = subject.trainer.objective
    if not objective.entropy_coef:
        return Check("bonus", "", skipped="the recipe has no entropy bonus")
    if (skip := unsteady(subject, "bonus") or subject.blocked("bonus", "advantage", "gradient")) is not None:
        return skip
    if not some_differ(subject.batch):
        return Check("bonus", "", skipped=ALIKE)
    batch, prepared = subject.batch, objective.prepare(subject.batch, subject.cap)
    nothing = replace(prepared, advantage=torch.zeros_like(prepared.advantage))
    both, alone = (subject.gradient(batch, given).flat for given in (prepared, nothing))
    rewards = float((both - alone).norm())
    says = f"the gradient of the entropy bonus is {float(alone.norm()) / max(rewards, 1e-300):.2g} times that of the rewards"
    if float(alone.norm()) <= rewards:
        return Check("bonus", says)
    return Check("bonus", says, (Finding(fault("K657"), says, float(alone.norm()), rewards),))
