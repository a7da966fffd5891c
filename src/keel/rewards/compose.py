"""Graders made of graders: weighted sums whose parts stay visible, and gates.

A grader is a function (prompt, text) → Score. One that grades faster together also has `many`, a function of a list of such pairs;
what is built here hands lists on, so that a judge deep inside is still asked many things at once.

Parts of a Score: a name without a dot is what that part added to the value, so these sum up to it; a name with a dot is a detail.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keel.errors import KeelError, nearest
from keel.types import Prompt, Score

Grader = Callable[[Prompt, str], Score]
Asked = tuple[Prompt, str]
NAME = re.compile(r"[A-Za-z_][\w\-]*")  # of a part: it becomes part of a metric's name


def grade_many(grader: Grader, asked: Sequence[Asked]) -> list[Score]:
    """The scores of a list, in its order: by the grader's `many` where it has one, else one by one.

    Raises:
        KeelError: `many` gave another number of scores than it was asked for.
    """
    many = getattr(grader, "many", None)
    scores = list(many(asked)) if many is not None else [grader(prompt, text) for prompt, text in asked]
    if len(scores) != len(asked):
        raise KeelError(f"A grader gave {len(scores)} scores for {len(asked)} completions. Expected one each, in their order.")
    return scores


def described(grader: Grader) -> Any:
    """What a verdict depends on, for the manifest: what the grader's `describe` or `version` says; "" where it says nothing."""
    describe = getattr(grader, "describe", None)
    return describe() if describe is not None else getattr(grader, "version", "")


def spent(grader: Grader | None) -> dict[str, float]:
    """What a grader has used up so far, by the names of the metrics below judge/; empty where it counts nothing."""
    count = getattr(grader, "spent", None)
    return count() if count is not None else {}


@dataclass(frozen=True)
class Part:
    """A grader, and how much its value counts."""

    grader: Grader
    weight: float = 1.0


class Weighted:
    """The sum of weight × value over parts. Unscorable if any part is, with that part's reason.

    What part k added stands in the score's parts as "k", what k itself kept as "k.…".

    Args:
        parts: by name.
        correct: the part that says whether the answer is right; the first unless given. Accuracy, dynamic sampling and pass@k
            look at it alone, whatever the other parts add.

    Raises:
        KeelError: no parts, a name that cannot stand in a metric's name, a weight that is not finite, or no such part.
    """

    def __init__(self, parts: Mapping[str, Part | Grader], correct: str = ""):
        if not parts:
            raise KeelError("A weighted sum has no parts. Expected at least one grader by its name.")
        self.parts = {name: part if isinstance(part, Part) else Part(part) for name, part in parts.items()}
        self.correct = correct or next(iter(parts))
        for name, part in self.parts.items():
            if not NAME.fullmatch(name) or not math.isfinite(part.weight):
                raise KeelError(
                    f"Part {name!r} of a weighted sum has the weight {part.weight}. Expected a finite number, and a name of "
                    f"letters, digits, _ and -: it becomes a metric, reward/part/{name}_mean."
                )
        if self.correct not in self.parts:
            raise KeelError(
                f"There is no part {self.correct!r} to say what is right: {nearest(self.correct, self.parts)}"
                f"Expected one of {', '.join(self.parts)}."
            )

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self.many([(prompt, text)])[0]

    def many(self, asked: Sequence[Asked]) -> list[Score]:
        columns = {name: grade_many(part.grader, asked) for name, part in self.parts.items()}
        return [self._sum({name: scores[row] for name, scores in columns.items()}) for row in range(len(asked))]

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        parts = {name: {"weight": part.weight, "grader": described(part.grader)} for name, part in self.parts.items()}
        return {"weighted": parts, "correct": self.correct}

    def spent(self) -> dict[str, float]:
        """What the parts have used up together."""
        total: Counter[str] = Counter()
        for part in self.parts.values():
            total.update(spent(part.grader))
        return dict(total)

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        for name, score in scores.items():
            if score.value is None or not math.isfinite(score.value):
                return Score(None, reason=f"{name}: {score.reason or f'{score.value} is not a finite number'}")
        added = {name: self.parts[name].weight * (score.value or 0.0) for name, score in scores.items()}
        details = {f"{name}.{detail}": value for name, score in scores.items() for detail, value in score.parts.items()}
        reason = "; ".join(f"{name}: {score.reason}" for name, score in scores.items() if score.reason)
        whole = scores[self.correct]
        return Score(sum(added.values()), whole.correct, reason, added | details, whole.said)


class Gated:
    """What a grader says where a completion has the right form, else `closed`; the form itself earns nothing.

    A bonus for the form would be earned by every wrong answer too, and a policy learns that first. Behind a gate the form is only
    the way in. The grader is not asked about what stays outside.

    Args:
        form: text → what is wrong with its form; "" where nothing is.
        grader: of what passed.
        closed: the value of what did not; not above the least that the grader gives, or bad form would pay.
        name: of the detail "NAME.open", 1 or 0.
    """

    def __init__(self, form: Callable[[str], str], grader: Grader, closed: float = 0.0, name: str = "format"):
        self.form, self.grader, self.closed, self.name = form, grader, closed, name

    def __call__(self, prompt: Prompt, text: str) -> Score:
        return self.many([(prompt, text)])[0]

    def many(self, asked: Sequence[Asked]) -> list[Score]:
        wrong = [self.form(text) for _, text in asked]
        scores = iter(grade_many(self.grader, [pair for pair, fault in zip(asked, wrong, strict=True) if not fault]))
        return [self._shut(fault) if fault else self._through(next(scores)) for fault in wrong]

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {"gate": self.name, "closed": self.closed, "grader": described(self.grader)}

    def spent(self) -> dict[str, float]:
        """What the grader behind the gate has used up."""
        return spent(self.grader)

    def _shut(self, fault: str) -> Score:
        return Score(self.closed, False, f"{self.name}: {fault}", {f"{self.name}.open": 0.0})

    def _through(self, score: Score) -> Score:
        return replace(score, parts={**score.parts, f"{self.name}.open": 1.0})
