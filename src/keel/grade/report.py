"""Everything that is measured of one grader, and of several on the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from keel.grade.agreement import Levels, Pairwise, against_levels, compare
from keel.grade.consequence import AtRate, consequence, enumerated
from keel.grade.pairs import Pair, Pairs, clusters
from keel.grade.rates import Interval, Rate, difference, rate, resampled
from keel.grade.surface import Surface, surface
from keel.grade.verdicts import Grader, Verdicts, again, swapped, verdicts

BINS = 10
SHOWN, LONGEST = 8, 200  # errors that are shown, and characters of each


@dataclass(frozen=True)
class Bin:
    """Answers whose verdict's value lies in a range: the value's mean, and how right they truly are."""

    low: float
    high: float
    value: float
    truth: Rate


@dataclass(frozen=True)
class Error:
    """One verdict that is wrong."""

    row: int
    kind: str
    answer: str
    gold: str
    value: float
    label: float


@dataclass(frozen=True)
class Accuracy:
    """A grader against labels.

    Args:
        tpr, fpr: of right answers and of wrong ones (level 0), those that it passes; among scorable verdicts.
        recall: of all right answers those that it passes: an unscorable verdict passes nothing.
        precision: of what it passes, how much is right, in this file's mixture.
        accuracy: verdicts that are as the label says; answers of a middle level are left out.
        j: TPR − FPR.
        slope: mean value at label 1 minus that at label 0, which is J where values are 0 and 1: the factor on a centred gradient.
        by_class: class → share of its answers that are graded well.
        passed_by_class: class → share of its *wrong* answers that are passed.
        levels: against a rubric's levels (or right and wrong).
        reliability: by the verdict's value.
        errors: some of them, those with the largest distance first.
        consequence: for training, by the prompt's true pass rate.
        enumerated: the largest distance of its two factors from an enumeration of every group of 4.
        worst_class: the class of wrong answers that it passes most often, where any is passed.
    """

    right: int
    wrong: int
    tpr: Rate
    fpr: Rate
    recall: Rate
    precision: Rate
    accuracy: Rate
    j: Interval
    slope: Interval
    by_class: Mapping[str, Rate]
    passed_by_class: Mapping[str, Rate]
    levels: Levels | None
    reliability: tuple[Bin, ...]
    surface: Surface
    errors: tuple[Error, ...]
    consequence: tuple[AtRate, ...]
    enumerated: float
    worst_class: str


@dataclass(frozen=True)
class Graded:
    """One grader.

    Args:
        unscorable: share of all answers; by_label: the same of right and of wrong ones.
        swap: share of verdicts that change when answer and gold are exchanged; None where it was not asked.
        again: share of verdicts that change when all are asked again in reverse order; None where it was not asked.
        accuracy: None without labels.
    """

    name: str
    answers: int
    passed: Rate
    unscorable: Rate
    unscorable_by_label: Mapping[str, Rate]
    reasons: Mapping[str, int]
    raised: int
    seconds_per_1000: float
    slowest_s: float
    cost_per_1000: float | None
    swap: float | None
    again: float | None
    accuracy: Accuracy | None


@dataclass(frozen=True)
class Report:
    """What `keel grade` found."""

    pairs: Pairs
    graders: tuple[Graded, ...]
    agreement: tuple[Pairwise, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines; of the answers only some errors are in it."""
        file = {"file": self.pairs.name, "answers": len(self.pairs.rows), "labelled": self.pairs.labelled}
        file |= {"columns": dict(self.pairs.columns), "left_out": {str(k): v for k, v in self.pairs.left_out.items()}}
        return file | {"graders": [asdict(each) for each in self.graders], "agreement": [asdict(each) for each in self.agreement]}


def report(
    pairs: Pairs,
    graders: Mapping[str, Grader],
    *,
    callers: int = 0,
    twice: bool = False,
    features: Sequence[str] = (),
    group_size: int = 8,
    seed: int = 0,
) -> Report:
    """Measure graders on the same answers.

    Args:
        callers: threads that ask a grader at once; 0 is as it likes best (a judge is asked many things at once).
        twice: ask everything again, in reverse order, and with answer and gold exchanged.
        features: columns of the file that errors may hang on, besides the surface.
        group_size: completions of a prompt in training, for what a division by the group's std does.
        seed: of the bootstrap.
    """
    said = {name: verdicts(name, grader, pairs.rows, callers) for name, grader in graders.items()}
    found = []
    for name, grader in graders.items():
        changes = [ask(grader, pairs.rows, said[name]) if twice else None for ask in (swapped, again)]
        found.append(graded(pairs, said[name], changes[0], changes[1], features, group_size, seed))
    names, right = list(graders), None
    if pairs.labelled == len(pairs.rows):
        right = np.array([pair.label == 1.0 for pair in pairs.rows])
    by, lines = clusters(pairs.rows), [pair.row for pair in pairs.rows]
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return Report(pairs, tuple(found), tuple(compare(said[a], said[b], by, lines, right) for a, b in both))


def graded(
    pairs: Pairs,
    said: Verdicts,
    swap: float | None = None,
    again: float | None = None,
    features: Sequence[str] = (),
    group_size: int = 8,
    seed: int = 0,
) -> Graded:
    """One grader's verdicts, measured."""
    by, scorable = clusters(pairs.rows), said.scorable
    label = np.array([np.nan if pair.label is None else pair.label for pair in pairs.rows])
    shares = {name: _rate(~scorable, label == level, by) for name, level in (("right", 1.0), ("wrong", 0.0))}
    usable = scorable & ~np.isnan(label)
    thousands = len(pairs.rows) / 1000
    return Graded(
        name=said.name,
        answers=len(pairs.rows),
        passed=_rate(said.passed, scorable, by),
        unscorable=rate(~scorable, by),
        unscorable_by_label=shares if pairs.labelled else {},
        reasons=said.reasons,
        raised=said.raised,
        seconds_per_1000=said.seconds_per_1000,
        slowest_s=float(said.call_s.max()),
        cost_per_1000=None if said.cost is None else said.cost / thousands,
        swap=swap,
        again=again,
        accuracy=accuracy(pairs.rows, said, label, by, features, group_size, seed) if usable.any() else None,
    )


def accuracy(
    rows: Sequence[Pair],
    said: Verdicts,
    label: np.ndarray,
    by: list[str],
    features: Sequence[str] = (),
    group_size: int = 8,
    seed: int = 0,
) -> Accuracy:
    """Against labels: [N] levels, NaN where there is none."""
    scorable, passed = said.scorable & ~np.isnan(label), said.passed
    right, wrong = scorable & (label == 1.0), scorable & (label == 0.0)
    tpr, fpr = _rate(passed, right, by), _rate(passed, wrong, by)
    good, decided = passed == (label == 1.0), right | wrong
    kinds = sorted({pair.kind for pair in rows if pair.kind})
    of = {kind: np.array([pair.kind == kind for pair in rows]) for kind in kinds}
    leaks = {kind: _rate(passed, wrong & member, by) for kind, member in of.items() if (wrong & member).any()}
    chosen = np.flatnonzero(decided)
    after = consequence(tpr.mean, fpr.mean, group_size) if tpr.of and fpr.of else []
    return Accuracy(
        right=int((label == 1.0).sum()),
        wrong=int((label == 0.0).sum()),
        tpr=tpr,
        fpr=fpr,
        recall=_rate(passed, label == 1.0, by),
        precision=_rate(label == 1.0, passed & decided, by),
        accuracy=_rate(good, decided, by),
        j=difference(tpr, fpr),
        slope=_slope(said.value[scorable], label[scorable], [by[i] for i in np.flatnonzero(scorable)], seed),
        by_class={kind: _rate(good, decided & member, by) for kind, member in of.items() if (decided & member).any()},
        passed_by_class=leaks,
        levels=_levels(said, label, scorable, by, seed),
        reliability=reliability(said.value, label, scorable, by),
        surface=surface([rows[i] for i in chosen], passed[chosen], right[chosen], [by[i] for i in chosen], features),
        errors=_errors(rows, said, label, scorable),
        consequence=tuple(after),
        enumerated=_checked(tpr.mean, fpr.mean) if after else 0.0,
        worst_class=max((kind for kind in leaks if leaks[kind].hits), key=lambda kind: leaks[kind].mean, default=""),
    )


def reliability(value: np.ndarray, label: np.ndarray, rows: np.ndarray, by: list[str]) -> tuple[Bin, ...]:
    """Answers by the value of their verdict, in tenths: a reward means what it says where value and truth are equal."""
    place = np.clip((np.where(rows, value, 0) * BINS).astype(int), 0, BINS - 1)
    found = []
    for number in range(BINS):
        member = rows & (place == number)
        if member.any():
            truth = _rate(label >= 1.0, member, by) if set(label[member]) <= {0.0, 1.0} else _mean(label[member])
            found.append(Bin(number / BINS, (number + 1) / BINS, float(value[member].mean()), truth))
    return tuple(found)


def _rate(hit: np.ndarray, rows: np.ndarray, by: list[str]) -> Rate:
    places = np.flatnonzero(rows)
    return rate(hit[places].astype(bool), [by[i] for i in places])


def _mean(label: np.ndarray) -> Rate:
    """Mean of labels between 0 and 1, with a normal interval."""
    mean, half = float(label.mean()), 1.96 * float(label.std()) / max(1, len(label)) ** 0.5
    return Rate(int((label == 1.0).sum()), len(label), mean, max(0.0, mean - half), min(1.0, mean + half))


def _slope(value: np.ndarray, label: np.ndarray, by: list[str], seed: int) -> Interval:
    """By how much the mean verdict rises from label 0 to label 1: least squares, which two levels make a difference of means."""

    def slope(value: np.ndarray, label: np.ndarray) -> float:
        spread = label - label.mean()
        total = float(spread @ spread)
        return float(spread @ value) / total if total > 0 else float("nan")

    return resampled(slope, (value, label), by, seed=seed)


def _levels(said: Verdicts, label: np.ndarray, scorable: np.ndarray, by: list[str], seed: int) -> Levels | None:
    if len(np.unique(label[scorable])) < 2:
        return None
    return against_levels(said.value[scorable], label[scorable], [by[i] for i in np.flatnonzero(scorable)], seed)


def _errors(rows: Sequence[Pair], said: Verdicts, label: np.ndarray, scorable: np.ndarray) -> tuple[Error, ...]:
    decided = scorable & ((label == 0.0) | (label == 1.0))
    wrong = [i for i in np.flatnonzero(decided) if said.passed[i] != (label[i] == 1.0)]
    wrong.sort(key=lambda i: (label[i], -abs(said.value[i] - label[i])))  # passes of wrong answers first
    kept = wrong[: SHOWN // 2] + wrong[len(wrong) - min(len(wrong) - len(wrong[: SHOWN // 2]), SHOWN // 2) :]
    return tuple(
        Error(rows[i].row, rows[i].kind, _shown(rows[i].text), _shown(rows[i].prompt.answer), float(said.value[i]), float(label[i]))
        for i in kept
    )


def _shown(text: str) -> str:
    """The text's beginning, as something that any file can hold."""
    return text[:LONGEST].encode("utf-8", "replace").decode()


def _checked(tpr: float, fpr: float) -> float:
    """Largest distance of the two factors from their enumeration, at three pass rates."""
    far = []
    for expected in consequence(tpr, fpr, 4, (0.1, 0.5, 0.9)):
        centred, by_std = enumerated(expected.pass_rate, tpr, fpr, 4)
        far += [abs(centred - expected.centred), abs(by_std - expected.by_std)]
    return max(far)
