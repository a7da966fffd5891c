"""Whether new weights arrive in the engine: sent several times, asked about what it knew and what it did not."""

from __future__ import annotations

from dataclasses import replace

import torch

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.forward import unsteady
from keel.doctor.probes.gap import batch_of, gap, largest_gap
from keel.doctor.subject import Subject
from keel.types import Prompt, Sampling

SYNCS = 3  # in a row
SHORT = 16  # tokens of a completion of a large model


def sync(subject: Subject) -> Check:
    """New weights three times, sent the way that training sends them: which arrive, and is anything kept of the old ones?"""
    if (skip := unsteady(subject, "sync")) is not None:
        return skip
    if "gap" not in subject.facts:
        gap(subject)
    before = subject.facts["gap"]
    bound = max(subject.facts["gap bound"], 3 * before)
    prompts = subject.rendered(subject.task.train[: 4 * (SYNCS + 1)])
    known, *fresh = (prompts[i : i + 4] for i in range(0, len(prompts), 4))
    names = list(subject.trainer.parameters)
    with subject.kept():
        subject.awake()
        subject.generate(known, 4, _short(subject))  # whatever is kept of these is kept from the old weights
        after = []
        for number in range(SYNCS):
            _moved(subject, names, number)
            after.append(_gap_after(subject, fresh[number] if number < len(fresh) else known))
        stale = _gap_after(subject, known)
        behind = subject.trainer.step - subject.parts.engine.version
    says = f"after new weights were sent, engine and trainer differ by up to {max(*after, stale):.1e} nats, before by {before:.1e}"
    findings: list[Finding] = []
    if behind or subject.config.engine.sync_every > 1:
        findings.append(_of_late(subject, behind))
    elif max(after) > bound:
        findings.append(_of_sync(subject, names, after, bound, says))
    elif stale > bound:
        says = f"{says}: only on prompts that it had answered under older weights, so it keeps something of them"
        findings.append(Finding(fault("K213"), says, stale, bound))
    subject.awake()
    return Check("sync", findings[0].says if findings else says, tuple(findings))


def _of_sync(subject: Subject, names: list[str], after: list[float], bound: float, says: str) -> Finding:
    late = sum(gap > bound for gap in after)
    if late < len(after):
        return Finding(fault("K214"), f"{says}: {late} of {len(after)} times they did not arrive", max(after), bound)
    missing = _missing(subject, names, bound)
    what = "nothing of them arrived" if missing is None else f"tensor {missing[0]!r} did not arrive"
    return Finding(fault("K214"), f"{says}: {what}", max(after), bound, evidence={"tensors": missing or names[:20]})


def _of_late(subject: Subject, behind: int) -> Finding:
    every = subject.config.engine.sync_every
    why = f"engine.sync_every is {every}" if every > 1 else f"the engine says that it is {behind} versions behind what was sent"
    says = f"{why}, so it samples from old weights while training takes them for its own"
    return Finding(fault("K214"), says, float(max(behind, every - 1)), 0.0, evidence={"sync_every": every})


def _missing(subject: Subject, names: list[str], bound: float) -> list[str] | None:
    """The tensor that does not arrive, by halving; None where both halves miss some."""
    while len(names) > 1:
        half = names[: len(names) // 2], names[len(names) // 2 :]
        bad = []
        for part in half:
            with subject.kept():
                _moved(subject, part)
                bad.append(_gap_after(subject, subject.rendered(subject.task.train[8:12])) > bound)
        if bad[0] == bad[1]:
            return None if all(bad) else names
        names = half[0] if bad[0] else half[1]
    return names


@torch.no_grad()
def _moved(subject: Subject, names: list[str], time: int = 0) -> None:
    """Move these tensors by a twentieth of their spread, each with a noise of its own, as another step of training might."""
    subject.fresh = False
    for i, name in enumerate(names):
        p = subject.trainer.parameters[name]
        scale = 0.05 * float(p.std()) if p.numel() > 1 and float(p.std()) > 0 else 0.05
        p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 1000 * time)).to(p))


def _gap_after(subject: Subject, prompts: list[Prompt]) -> float:
    """The largest gap of completions of these prompts, after the weights were sent as training sends them."""
    subject.trainer.step += 1
    subject.fresh = False
    subject.awake()
    batch = batch_of(prompts, subject.generate(prompts, 4, _short(subject)))
    return largest_gap(subject, subject.look(batch), batch)


def _short(subject: Subject) -> Sampling:
    """Of a large model a few tokens tell as much as many do: weights that were moved hardly ever end an answer."""
    return replace(subject.sampling, max_completion_tokens=min(subject.cap, SHORT)) if subject.large else subject.sampling
