"""What a grader says about each answer, and how long it takes to say it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from keel.grade.pairs import Pair
from keel.rewards.compose import grade_many
from keel.types import Prompt, Score

Grader = Callable[[Prompt, str], Score]
RAISED = "it raised "


@dataclass(frozen=True)
class Verdicts:
    """One grader's verdicts, in the order of the answers.

    Args:
        value: [N] the reward; NaN where unscorable.
        passed: [N] whether it was called right.
        reasons: unscorable verdicts by their reason.
        raised: how many times the grader raised, which a grader must never do; those count as unscorable.
        wall_s: seconds for all of them.
        call_s: [N] seconds of each call; NaN where all were asked at once.
        cost: what it says that it cost, in its own unit of money; None where it does not say.
    """

    name: str
    value: Float[np.ndarray, " N"]
    passed: Bool[np.ndarray, " N"]
    reasons: Mapping[str, int]
    raised: int
    wall_s: float
    call_s: Float[np.ndarray, " N"]
    cost: float | None = None

    @property
    def scorable(self) -> Bool[np.ndarray, " N"]:
        return ~np.isnan(self.value)

    @property
    def seconds_per_1000(self) -> float:
        """Wall time, so many callers at once as there were."""
        return 1000 * self.wall_s / max(1, len(self.value))


def verdicts(name: str, grader: Grader, pairs: Sequence[Pair], callers: int = 0) -> Verdicts:
    """Ask a grader about every answer.

    Args:
        callers: threads that ask at once; 0 is as the grader likes it best: all at once by its `many`, where it has one, else one
            by one. Verdicts do not depend on it, only time does.
    """
    before, begun = _cost(grader), time.perf_counter()
    said = _ask_many(grader, pairs) if callers == 0 and hasattr(grader, "many") else None
    if said is None and callers <= 1:
        said = [_ask(grader, pair) for pair in pairs]
    elif said is None:
        with ThreadPoolExecutor(callers) as pool:
            said = list(pool.map(lambda pair: _ask(grader, pair), pairs))
    scores, seconds = [score for score, _ in said], [second for _, second in said]
    unscorable = Counter(score.reason or "no reason given" for score in scores if score.value is None)
    return Verdicts(
        name=name,
        value=np.array([np.nan if score.value is None else score.value for score in scores], dtype=float),
        passed=np.array([score.value is not None and score.correct for score in scores], dtype=bool),
        reasons=dict(unscorable.most_common()),
        raised=sum(score.reason.startswith(RAISED) for score in scores),
        wall_s=time.perf_counter() - begun,
        call_s=np.array(seconds, dtype=float),
        cost=None if before is None else float((_cost(grader) or 0.0) - before),
    )


def swapped(grader: Grader, pairs: Sequence[Pair], said: Verdicts) -> float:
    """Share of answers whose verdict changes when the answer and the gold answer are exchanged.

    Two texts are equal or not, whichever stands first: a grader of equality that minds is wrong on one side. Answers that are
    empty, or unscorable either way, are left out; NaN when none is left.
    """
    changed = []
    for pair, passed, scorable in zip(pairs, said.passed, said.scorable, strict=True):
        if scorable and pair.text.strip():
            prompt = Prompt(id=pair.prompt.id, text=pair.prompt.text, answer=pair.text, data=pair.prompt.data)
            other, _ = _ask(grader, Pair(prompt, pair.prompt.answer, pair.label, pair.kind, pair.row))
            changed += [other.correct != bool(passed)] if other.scorable else []
    return float(np.mean(changed)) if changed else float("nan")


def again(grader: Grader, pairs: Sequence[Pair], said: Verdicts) -> float:
    """Share of verdicts that change when the same answers are asked once more, the last one first.

    0 for a grader whose verdict hangs on the answer alone: neither on chance nor on what it graded before. An answer that is
    scorable only once has changed.
    """
    other = [_ask(grader, pair)[0] for pair in reversed(pairs)][::-1]
    now = [(score.scorable, score.scorable and score.correct) for score in other]
    then = list(zip(said.scorable.tolist(), said.passed.tolist(), strict=True))
    return float(np.mean([a != b for a, b in zip(now, then, strict=True)]))


def _ask_many(grader: Grader, pairs: Sequence[Pair]) -> list[tuple[Score, float]] | None:
    """All verdicts in one call, without the time of each; None where it raises, and has to be asked one by one."""
    try:
        scores = grade_many(grader, [(pair.prompt, pair.text) for pair in pairs])
    except Exception:  # a grader of anyone's: which answer made it raise is found one by one
        return None
    return [(_finite(score), float("nan")) for score in scores]


def _finite(score: Score) -> Score:
    if score.value is None or np.isfinite(score.value):
        return score
    return Score(None, reason=f"its value is {score.value}, which is not finite")


def _ask(grader: Grader, pair: Pair) -> tuple[Score, float]:
    begun = time.perf_counter()
    try:
        score = _finite(grader(pair.prompt, pair.text))
    except Exception as error:  # a grader of anyone's: that it raises is what is measured here
        score = Score(None, reason=f"{RAISED}{type(error).__name__}")
    return score, time.perf_counter() - begun


def _cost(grader: Grader) -> float | None:
    """What a grader has cost so far, where it keeps count in an attribute `cost`."""
    cost = getattr(grader, "cost", None)
    return float(cost) if isinstance(cost, int | float) and not isinstance(cost, bool) else None
