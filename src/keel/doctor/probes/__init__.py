"""Probes: each asks the living system one question whose answer is known. `PROBES` lists them in the order of asking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from keel.doctor.finding import Check
from keel.doctor.invariants import metrics_of_a_step
from keel.doctor.probes import (
    collecting,
    controls,
    data,
    draws,
    forward,
    gap,
    grading,
    groups,
    objective,
    optimizer,
    reward,
    step,
    sync,
    terms,
)
from keel.doctor.subject import Subject
from keel.errors import KeelError, nearest

Probe = Callable[[Subject], Check]
PROBES: dict[str, Probe] = {
    "gold": reward.gold,
    "cheats": reward.cheats,
    "junk": reward.junk,
    "hangs": grading.hangs,
    "copies": data.copies,
    "end tokens": groups.ends,
    "threads": grading.threads,
    "rows": groups.rows,
    "echo": groups.echo,
    "stream": collecting.stream,
    "filling": collecting.filling,
    "repeat": forward.repeats,
    "padding": forward.alone,
    "own logits": forward.own_logits,
    "backward": forward.backward,
    "gap": gap.gap,
    "unique": draws.unique,
    "sampling": draws.sampling,
    "sync": sync.sync,
    "again": step.again,
    "masked": step.masked,
    "cuts": step.cuts,
    "order": step.order,
    "non-finite gradient": optimizer.non_finite,
    "updates": step.updates,
    "metrics": metrics_of_a_step,
    "advantages": objective.advantages,
    "formula": objective.formula,
    "direction": objective.direction,
    "bandit": controls.bandit,
    "reversed": controls.reversed_rewards,
    "coins": controls.coins,
    "reference": objective.reference,
    "KL gradient": objective.kl_gradient,
    "census": optimizer.census,
    "schedule": optimizer.schedule,
    "decay": terms.decay,
    "bonus": terms.bonus,
    "resume": optimizer.resumes,
    "endings": grading.endings,
    "budget": data.budget,
    "choice": data.choice,
    "golds": data.golds,
    "difficulty": data.difficulty,
}
LEFT_OVER = ("golds", "difficulty")  # what they find is believed only where nothing else explains it


def ask(subject: Subject, names: Iterable[str] = tuple(PROBES), see: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Put these probes to a subject.

    Args:
        see: is told each check as it is made.

    Raises:
        KeelError: there is no such probe.
    """
    checks: list[Check] = []
    for name in names:
        if name not in PROBES:
            raise KeelError(f"There is no probe {name!r}: {nearest(name, PROBES)}Known are {', '.join(PROBES)}.")
        checks.append(_asked(subject, name))
        see(checks[-1])
    return checks


def _asked(subject: Subject, name: str) -> Check:
    begun = time.perf_counter()
    try:
        check = PROBES[name](subject)
    except KeelError as refused:  # a piece of the system refused to work: that is told, and other questions can still be asked
        check = Check(name, "", skipped=str(refused))
    except Exception as broken:  # whatever a broken system raises
        check = Check(name, "", skipped=f"the system raised {type(broken).__name__}: {str(broken)[:200]}")
    return replace(check, name=name, seconds=time.perf_counter() - begun)
