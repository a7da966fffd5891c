"""Which of measured candidates to keep: those from which there is most to learn, and not all of one kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.data.curriculum import information
from keel.data.near import template
from keel.types import Prompt

CROWDED = 3.0  # an answer may come so many times as often as if all came alike


@dataclass(frozen=True)
class Candidate:
    """A question with its pass rate.

    Args:
        source: name of the task that it is of.
        verified: "recomputed" or "graded".
        right, tries: of the model's scored completions.
    """

    prompt: Prompt
    source: str
    verified: str
    right: int = 0
    tries: int = 0

    @property
    def pass_rate(self) -> float:
        return self.right / self.tries if self.tries else float("nan")


@dataclass(frozen=True)
class Chosen:
    """What was selected, in the order of the draw, and why the others were not."""

    candidates: tuple[Candidate, ...]
    left: dict[str, int]


def select(candidates: Sequence[Candidate], size: int, low: float, high: float, seed: int) -> Chosen:
    """Draw `size` candidates whose pass rate lies in [low, high].

    Sources take turns, and within a source the texts that differ in more than numbers. Within those a candidate is drawn with a
    chance proportional to its expected p(1−p). An answer that is crowded already is passed over.
    """
    able = [c for c in candidates if c.tries and low <= c.pass_rate <= high]
    left = Counter(_why(c, low, high) for c in candidates if not (c.tries and low <= c.pass_rate <= high))
    room = max(1, math.ceil(CROWDED * size / max(1, len({c.prompt.answer for c in able}))))
    answers: Counter[str] = Counter()
    chosen = []
    for candidate in _in_turns(able, seed):
        if len(chosen) == size:
            left["enough"] += 1
        elif answers[candidate.prompt.answer] >= room:
            left["answer is crowded"] += 1
        else:
            answers[candidate.prompt.answer] += 1
            chosen.append(candidate)
    return Chosen(tuple(chosen), dict(left))


def _why(candidate: Candidate, low: float, high: float) -> str:
    if not candidate.tries:
        return "not measured"
    return "too hard" if candidate.pass_rate < low else "too easy"


def _in_turns(candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """Ordered by a weighted draw; then the first of every text before the second of any, the first of every source likewise."""
    counts = np.array([(c.right, c.tries) for c in candidates], dtype=float).reshape(-1, 2)
    late = np.random.default_rng([seed, 7]).exponential(size=len(candidates)) / information(counts[:, 0], counts[:, 1])
    ordered = [candidates[i] for i in np.argsort(late, kind="stable")]
    by_text = _ranked(ordered, [(c.source, template(c.prompt.text)) for c in ordered])
    return _ranked(by_text, [c.source for c in by_text])


def _ranked(ordered: Sequence[Candidate], kinds: Sequence[object]) -> list[Candidate]:
    """The same, the first of each kind first, then the second of each; among those as it was."""
    seen: Counter[object] = Counter()
    ranks = []
    for kind in kinds:
        ranks.append(seen[kind])
        seen[kind] += 1
    return [candidate for _, _, candidate in sorted(zip(ranks, range(len(ranks)), ordered, strict=True), key=lambda each: each[:2])]


def effective_answers(candidates: Sequence[Candidate]) -> float:
    """e to the entropy of the answers: how many there are, counting rare ones for less."""
    counts = np.array(list(Counter(c.prompt.answer for c in candidates).values()), dtype=float)
    share = counts / counts.sum() if len(counts) else counts
    return float(np.exp(-(share * np.log(share)).sum())) if len(counts) else 0.0
