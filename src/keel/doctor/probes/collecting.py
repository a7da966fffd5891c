"""How a batch comes about: which prompts are given out, and which groups dynamic sampling keeps."""

from __future__ import annotations

from dataclasses import replace

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import Subject
from keel.training.buffer import Filling
from keel.types import Score, row_of


def stream(subject: Subject) -> Check:
    """Batches in a row: no prompt comes twice before all have come once."""
    train, size = subject.task.train, subject.config.train.prompts_per_step
    batches = min(4, len(train) // size)
    if batches < 2:
        return Check("stream", f"two batches of {size} prompts are more than all {len(train)} rows")
    prompts = subject.trainer.stream
    held, prompts.taken = prompts.taken, 0
    every = [row_of(prompt.id) for _ in range(batches) for prompt in prompts.take(size)]
    prompts.taken = held
    again = len(every) - len(set(every))
    if not again or len({row_of(prompt.id) for prompt in train}) < len(train):
        return Check("stream", f"{batches} batches of {size} prompts are {len(set(every))} different rows")
    says = f"{again} of {len(every)} prompts in {batches} batches were given out before, though {len(train)} rows are there"
    return Check("stream", says, (Finding(fault("K171"), says, float(again), 0.0),))


def filling(subject: Subject) -> Check:
    """Dynamic sampling on groups that all, none and some solved: only the last may be kept."""
    if not subject.config.train.dynamic_sampling:
        return Check("filling", "", skipped="the recipe has no dynamic sampling")
    group, kinds = subject.groups[0], {"everybody": (1, 1), "nobody": (0, 0), "some": (0, 1)}
    if len(group.scores) < 2:
        return Check("filling", "", skipped="groups of one completion cannot have right and wrong ones")
    asked = []
    for name, verdicts in kinds.items():
        scores = tuple(Score(float(verdicts[i % 2]), verdicts[i % 2] == 1) for i in range(len(group.scores)))
        asked.append(replace(group, prompt=replace(group.prompt, id=name), scores=scores))
    batch = Filling(prompts=9, live_only=True, max_rounds=9)
    batch.add(asked)
    kept = sorted(each.prompt.id for each in batch.kept)
    if kept == ["some"]:
        return Check("filling", "dynamic sampling keeps groups that some solved, and no others")
    says = f"of groups that everybody, nobody and some solved, dynamic sampling keeps {', '.join(kept) or 'none'}"
    return Check("filling", says, (Finding(fault("K172"), says, float(len(kept)), 1.0),))
