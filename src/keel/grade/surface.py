"""Whether a grader's errors can be read off the surface of an answer: its length, its format, a phrase in it.

Each feature is tried by itself, among right answers (does it make them fail?) and among wrong ones (does it make them pass?), and
the chances are corrected for how many were tried; of two tests, one with answers and one with questions as independent, the more
careful one counts. An error that hangs on a feature is worse than one that does not: the policy
learns the feature.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from keel.grade.pairs import Pair
from keel.grade.rates import Interval, Rate, auc, difference, numbered, rate

LEVEL = 0.05  # chance of any false finding at all, over all that is tried
LEAST = 5  # errors, and answers with the feature and without it, below which nothing is tried
MOST_WORDS = 20  # of the file's own words, the most frequent
_WORD = re.compile(r"[^\W\d_]{2,}")

NUMBERS: dict[str, Callable[[Pair], float]] = {
    "length in characters": lambda pair: float(len(pair.text)),
    "length against the gold answer's": lambda pair: len(pair.text) / max(1, len(pair.prompt.answer)),
    "lines": lambda pair: float(pair.text.count("\n")),
    "share of digits": lambda pair: sum(c.isdigit() for c in pair.text) / max(1, len(pair.text)),
}
FORMATS: dict[str, Callable[[Pair], bool]] = {
    "\\boxed": lambda pair: "\\boxed" in pair.text,
    "a LaTeX command": lambda pair: re.search(r"\\[A-Za-z]", pair.text) is not None,
    "dollar signs": lambda pair: "$" in pair.text,
    "a decimal point": lambda pair: re.search(r"\d\.\d", pair.text) is not None,
    "a thousands comma": lambda pair: re.search(r"\d,\d{3}(?!\d)", pair.text) is not None,
    "a slash": lambda pair: "/" in pair.text,
    "a percent sign": lambda pair: "%" in pair.text,
    "a minus sign": lambda pair: re.search(r"[-−]", pair.text) is not None,
    "an equals sign": lambda pair: "=" in pair.text,
    "brackets": lambda pair: re.search(r"[(\[{]", pair.text) is not None,
    "tags": lambda pair: re.search(r"</?\w+>", pair.text) is not None,
    "several lines": lambda pair: "\n" in pair.text.strip(),
    "several numbers": lambda pair: len(re.findall(r"\d+(?:[.,]\d+)*", pair.text)) > 1,
    "a full stop at the end": lambda pair: pair.text.rstrip().endswith("."),
    "spaces at its ends": lambda pair: pair.text != pair.text.strip(),
    "letters that are not ASCII": lambda pair: any(ord(c) > 127 for c in pair.text),
    "invisible characters": lambda pair: any(unicodedata.category(c) in ("Cf", "Cc") and c not in "\n\t" for c in pair.text),
    "the gold answer, word for word": lambda pair: pair.prompt.answer.strip() in pair.text,
    "the gold answer before its last line": lambda pair: pair.prompt.answer.strip() in pair.text.strip().rpartition("\n")[0],
    "a claim to be right": lambda pair: re.search(r"(?i)\b(correct|right|grader?|score|full marks)\b", pair.text) is not None,
}


@dataclass(frozen=True)
class Effect:
    """One feature, among right or among wrong answers.

    Args:
        among: "right" (errors are failures) or "wrong" (errors are passes).
        with_it, without: error rates; None for a feature that is a number.
        size: what it changes: the difference of those rates, or for a number the chance that an error's is above that of an
            answer that was graded well (.5 is nothing).
        p: chance of an effect this large where there is none.
        p_corrected: the same for any one of all that were tried (Holm).
    """

    feature: str
    among: str
    with_it: Rate | None
    without: Rate | None
    size: Interval
    p: float
    p_corrected: float

    @property
    def found(self) -> bool:
        return self.p_corrected < LEVEL


@dataclass(frozen=True)
class Surface:
    """What was tried, the likeliest first; and the effect of length by itself, whatever came of it."""

    tried: int
    effects: tuple[Effect, ...]
    length: dict[str, Interval]

    @property
    def found(self) -> tuple[Effect, ...]:
        return tuple(effect for effect in self.effects if effect.found)


def surface(
    pairs: Sequence[Pair],
    passed: Bool[np.ndarray, " N"],
    right: Bool[np.ndarray, " N"],
    cluster: Sequence[str],
    columns: Sequence[str] = (),
) -> Surface:
    """Which features of the answers predict the grader's errors.

    Args:
        pairs, passed, right, cluster: of scorable, labelled answers.
        columns: of the file, which are tried too: the place at which a judge was shown the answer, its author.
    """
    own_numbers, own_formats = of_columns(pairs, columns)
    numbers = {name: np.array([measure(pair) for pair in pairs], dtype=float) for name, measure in (NUMBERS | own_numbers).items()}
    features = FORMATS | words(pairs) | own_formats
    formats = {name: np.array([has(pair) for pair in pairs], dtype=bool) for name, has in features.items()}
    effects = []
    for among, rows in (("right", right), ("wrong", ~right)):
        error, names = (passed != right)[rows], [c for c, chosen in zip(cluster, rows, strict=True) if chosen]
        if min(error.sum(), (~error).sum()) < LEAST:
            continue
        effects += [_of_format(name, among, has[rows], error, names) for name, has in formats.items()]
        effects += [_of_number(name, among, value[rows], error, names) for name, value in numbers.items()]
    kept = _corrected([effect for effect in effects if effect is not None])
    lengths = numbers["length in characters"]
    by_length = {among: auc(lengths[rows], (passed != right)[rows]) for among, rows in (("right", right), ("wrong", ~right))}
    return Surface(len(kept), tuple(sorted(kept, key=lambda effect: effect.p)), by_length)


def words(pairs: Sequence[Pair]) -> dict[str, Callable[[Pair], bool]]:
    """The most frequent words of the answers that some have and others have not, as features."""
    has = {pair.row: set(_WORD.findall(pair.text.lower())) for pair in pairs}
    counts = Counter(word for found in has.values() for word in found)
    usual = [word for word, count in counts.most_common() if LEAST <= count <= len(pairs) - LEAST][:MOST_WORDS]
    return {f"the word {word!r}": lambda pair, word=word: word in has[pair.row] for word in usual}


def of_columns(
    pairs: Sequence[Pair], columns: Sequence[str]
) -> tuple[dict[str, Callable[[Pair], float]], dict[str, Callable[[Pair], bool]]]:
    """A column of numbers as one feature, any other column as one feature for each of its frequent values."""
    numbers: dict[str, Callable[[Pair], float]] = {}
    formats: dict[str, Callable[[Pair], bool]] = {}
    for column in columns:
        values = [pair.prompt.data.get(column) for pair in pairs]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            numbers[column] = lambda pair, column=column: float(pair.prompt.data[column])
            continue
        for value, _ in Counter(map(str, values)).most_common(MOST_WORDS):
            formats[f"{column} {value!r}"] = lambda pair, column=column, value=value: str(pair.prompt.data.get(column)) == value
    return numbers, formats


def clustered_p(value: Float[np.ndarray, " N"], error: Bool[np.ndarray, " N"], cluster: Sequence[str]) -> float:
    """Chance of such a difference in the mean value between errors and the rest, questions (not answers) taken as independent.

    Each question's share of the covariance counts once: with all errors in one question it is no evidence at all.

    Source: the robust score test of D. Boos, The American Statistician 46 (1992), by clusters. Differs from it: in nothing.
    """
    from scipy.stats import norm

    score = np.bincount(numbered(cluster), weights=(error - error.mean()) * (value - value.mean()))
    size = float((score**2).sum()) ** 0.5
    return float(2 * norm.sf(abs(float(score.sum())) / size)) if size > 0 else 1.0


def _of_format(
    name: str, among: str, has: Bool[np.ndarray, " N"], error: Bool[np.ndarray, " N"], cluster: list[str]
) -> Effect | None:
    from scipy.stats import fisher_exact

    if min(has.sum(), (~has).sum()) < LEAST:
        return None
    here = [rate(error[rows], [c for c, chosen in zip(cluster, rows, strict=True) if chosen]) for rows in (has, ~has)]
    table = [[each.hits, each.of - each.hits] for each in here]
    p = max(float(fisher_exact(table).pvalue), clustered_p(has.astype(float), error, cluster))
    return Effect(name, among, here[0], here[1], difference(here[0], here[1]), p, 1.0)


def _of_number(
    name: str, among: str, value: Float[np.ndarray, " N"], error: Bool[np.ndarray, " N"], cluster: list[str]
) -> Effect | None:
    from scipy.stats import mannwhitneyu, rankdata

    if min(error.sum(), (~error).sum()) < LEAST or len(np.unique(value)) < 2:
        return None
    p = max(float(mannwhitneyu(value[error], value[~error]).pvalue), clustered_p(rankdata(value), error, cluster))
    return Effect(name, among, None, None, auc(value, error), p, 1.0)


def _corrected(effects: Sequence[Effect]) -> list[Effect]:
    """The same with Holm's correction.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979). Differs from it: in nothing.
    """
    from dataclasses import replace

    ordered, least, out = sorted(effects, key=lambda effect: effect.p), 0.0, []
    for rank, effect in enumerate(ordered):
        least = max(least, min(1.0, (len(ordered) - rank) * effect.p))
        out.append(replace(effect, p_corrected=least))
    return out
