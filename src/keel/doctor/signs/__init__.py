"""Signs: what a run left, each looked at for one thing: pure functions from a `Record` to a `Check`. `SIGNS` lists them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from keel.doctor.finding import Check, Part
from keel.doctor.invariants import health
from keel.doctor.record import Record
from keel.doctor.signs import answers, batches, course

Sign = Callable[[Record], Check]
SIGNS: dict[str, tuple[Part, Sign]] = {  # name: (the part of which it speaks where it holds, how to look)
    "health": ("framework", health),
    "batches": ("framework", batches.whole),
    "ratio": ("framework", batches.ratio),
    "stored advantages": ("framework", batches.advantages),
    "stored weights": ("framework", batches.weights),
    "gap in the run": ("engine gap", batches.gap),
    "repeats in the run": ("engine gap", batches.repeats),
    "pairs in the run": ("framework", answers.pairs),
    "copies in batches": ("data", answers.copies),
    "gold in the run": ("reward", answers.golds),
    "stored scores": ("reward", answers.verdicts),
    "verdicts in the run": ("reward", course.scorable),
    "length in the run": ("settings", course.length),
    "groups in the run": ("difficulty", course.groups),
    "course": ("settings", course.fall),
}


def look(record: Record) -> list[Check]:
    """Every sign of this record."""
    return [_seen(name, record) for name in SIGNS]


def _seen(name: str, record: Record) -> Check:
    begun = time.perf_counter()
    check = SIGNS[name][1](record)
    return replace(check, name=name, seconds=time.perf_counter() - begun)
