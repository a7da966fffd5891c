"""From paired differences to a verdict: supported, refuted, or too small to tell.

Each prediction names a set of differences D = arm − reference that would make it true:

    higher  D > margin        lower  D < −margin        equal  −margin ≤ D ≤ margin

higher, lower: *supported* if the paired t interval of 95 % lies in the set, *refuted* if it lies outside. So "not higher by what
would matter" can be shown as well as "higher by it"; with a margin of 0 only "lower" refutes "higher".
equal: *supported* if the 90 % interval lies in the set (two one-sided tests at 5 %), *refuted* if the 95 % interval lies outside.
Everything else is *too small to tell*.

Predictions of one study are judged together: each has a p (two-sided at the border that decides; of the two one-sided tests the
larger one for equality), and Holm's p must be below .05. With fewer seeds than `confirm_seeds`, in a quick size, with pairs
missing, or for a prediction that was written after the first run, a verdict is a hint: it *points to it* or *points against it*,
and is never supported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.lab.predictions import Prediction
from keel.lab.statistics import (
    ALPHA,
    bootstrap_interval,
    equivalence_power,
    holm,
    minimum_detectable,
    minimum_margin,
    power,
    probability_of_improvement,
    seeds_needed,
    sign_flip,
    t_above,
    t_interval,
)

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "too small to tell"
HINT_FOR, HINT_AGAINST = "points to it", "points against it"
UNITS = {"difference": "", "log2": " in log2", "ranks": ", rank correlation"}
HINTS = {SUPPORTED: HINT_FOR, REFUTED: HINT_AGAINST, OPEN: OPEN}


@dataclass(frozen=True)
class Pairs:
    """What a prediction compares, seed by seed.

    Args:
        seeds: of all pairs that were planned.
        arm, reference: a number for each of them; NaN where there is none.
        missing: why, in words, for each pair that is not whole.
        reservations: reasons why a verdict can be no more than a hint, besides few seeds and missing pairs.
    """

    prediction: Prediction
    seeds: tuple[int, ...]
    arm: tuple[float, ...]
    reference: tuple[float, ...]
    missing: tuple[str, ...] = ()
    reservations: tuple[str, ...] = ()

    @property
    def differences(self) -> np.ndarray:
        """Of the pairs that are whole."""
        a, b = np.asarray(self.arm, float), np.asarray(self.reference, float)
        if self.prediction.scale == "log2":
            with np.errstate(all="ignore"):
                a, b = np.log2(a), np.log2(b)
        whole = np.isfinite(a) & np.isfinite(b)
        return a[whole] - b[whole]


@dataclass(frozen=True)
class Verdict:
    """A prediction and what became of it.

    Args:
        verdict: supported, refuted, too small to tell, points to it, points against it.
        words: the numbers behind it, in a sentence or two.
        pairs: differences that were seen; `planned` of them should have been.
        mean, low, high: of the paired difference, with the t interval of 95 %; `low90` and `high90` of 90 %.
        boot_low, boot_high: BCa bootstrap interval of 95 %.
        p, p_holm: of the test that decides, alone and after Holm; `p_sign_flip`: two-sided, that the difference is 0.
        improvement: chance that a run of the arm ends above one of the reference under another seed.
        detectable: the difference beyond the border that these seeds find with a chance of 80 %; for equality the margin that they
            show to be kept with that chance where there is no difference.
        seeds_needed: seeds that would tell with a chance of 80 %, were the truth what was seen; None = none that can be paid.
        hint: why it is only a hint; empty for a verdict.
        values: (seed, arm, reference) of every pair.
    """

    says: str
    verdict: str
    words: str
    arm: str
    against: str
    metric: str
    at: str
    expect: str
    margin: float
    scale: str
    pairs: int
    planned: int
    mean: float
    low: float
    high: float
    low90: float
    high90: float
    boot_low: float
    boot_high: float
    p: float
    p_holm: float
    p_sign_flip: float
    improvement: float
    detectable: float
    seeds_needed: int | None
    hint: tuple[str, ...]
    missing: tuple[str, ...]
    values: tuple[tuple[int, float, float], ...]


def judge(all_pairs: Sequence[Pairs], confirm_seeds: int = 10) -> list[Verdict]:
    """A verdict for each prediction of one study, with Holm's correction over all of them."""
    return [
        _verdict(pairs, lean, p, p_holm, len(all_pairs), confirm_seeds)
        for pairs, (lean, p, p_holm) in zip(all_pairs, decisions(all_pairs), strict=True)
    ]


def decisions(all_pairs: Sequence[Pairs]) -> list[tuple[str, float, float]]:
    """(which way it leans, p, p after Holm) of each prediction: decided where the last is below .05."""
    alone = [decide(pairs.differences, pairs.prediction.expect, pairs.prediction.margin) for pairs in all_pairs]
    adjusted = holm([p for _, p in alone])
    return [(lean, p, p_holm) for (lean, p), p_holm in zip(alone, adjusted, strict=True)]


def decide(differences: np.ndarray, expect: str, margin: float) -> tuple[str, float]:
    """Which way the differences lean, supported or refuted, and the p with which they do: the verdict where p < .05."""
    if len(differences) < 2:
        return OPEN, 1.0
    ours = -differences if expect == "lower" else differences
    mean = float(ours.mean())
    if expect == "equal":
        inside = float(_inside(ours, margin))
        outside = 2 * min(float(t_above(ours, margin)), float(t_above(-ours, margin)))
        return (SUPPORTED, inside) if abs(mean) <= margin else (REFUTED, min(1.0, outside))
    above = float(t_above(ours, margin))
    return (SUPPORTED if mean > margin else REFUTED), min(1.0, 2 * min(above, 1 - above))


def calls(differences: np.ndarray, expect: str, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The same rule for many experiments at once, without Holm.

    Args:
        differences: [experiments, S].

    Returns:
        which are supported, which refuted.
    """
    ours = -differences if expect == "lower" else differences
    if expect == "equal":
        return _inside(ours, margin) < ALPHA, 2 * np.minimum(t_above(ours, margin), t_above(-ours, margin)) < ALPHA
    above = t_above(ours, margin)
    return 2 * above < ALPHA, 2 * (1 - above) < ALPHA


def _inside(differences: np.ndarray, margin: float) -> np.ndarray:
    """The larger p of two one-sided tests. Differences that are all the same, as of runs that do the same, leave no doubt."""
    larger = np.maximum(t_above(differences, -margin), t_above(-differences, -margin))
    same = np.ptp(differences, axis=-1) == 0
    return np.where(same, np.where(np.abs(differences.mean(-1)) <= margin, 0.0, 1.0), larger)


def _verdict(pairs: Pairs, lean: str, p: float, p_holm: float, family: int, confirm_seeds: int) -> Verdict:
    told, found = pairs.prediction, pairs.differences
    n = len(found)
    verdict = lean if p_holm < ALPHA else OPEN
    hint = _why_a_hint(pairs, n, confirm_seeds)
    (low, high), (low90, high90) = (_ends(found, level) for level in (0.95, 0.9))
    boot = bootstrap_interval(found, seed=0) if n > 1 else (math.nan, math.nan)
    sd = float(found.std(ddof=1)) if n > 1 else math.nan
    numbers = {
        "pairs": n,
        "planned": len(pairs.seeds),
        "mean": float(found.mean()) if n else math.nan,
        "low": low,
        "high": high,
        "low90": low90,
        "high90": high90,
        "boot_low": boot[0],
        "boot_high": boot[1],
        "p": p,
        "p_holm": p_holm,
        "p_sign_flip": sign_flip(found, seed=0),
        "improvement": _improvement(pairs),
        "detectable": (minimum_margin if told.expect == "equal" else minimum_detectable)(sd, n, ALPHA / family),
        "seeds_needed": _seeds_needed(found, told, ALPHA / family) if verdict == OPEN else n,
    }
    kind = HINTS[verdict] if hint else verdict
    return Verdict(
        says=told.says,
        verdict=kind,
        words=_words(pairs, verdict, kind, numbers, hint, family),
        arm=told.arm,
        against=_against(told),
        metric=told.metric,
        at=told.at,
        expect=told.expect,
        margin=told.margin,
        scale=told.scale,
        hint=hint,
        missing=pairs.missing,
        values=tuple(zip(pairs.seeds, pairs.arm, pairs.reference, strict=True)),
        **numbers,
    )


def _ends(found: np.ndarray, level: float) -> tuple[float, float]:
    if not len(found):
        return math.nan, math.nan
    low, high = t_interval(found, level)
    return float(low), float(high)


def _improvement(pairs: Pairs) -> float:
    a, b = (np.asarray(values, float) for values in (pairs.arm, pairs.reference))
    return probability_of_improvement(a[np.isfinite(a)], b[np.isfinite(b)])


def _why_a_hint(pairs: Pairs, n: int, confirm_seeds: int) -> tuple[str, ...]:
    told = [f"{n} seeds, and a verdict takes {confirm_seeds}"] if n < confirm_seeds else []
    told += ["pairs are missing"] if pairs.missing else []
    return (*told, *pairs.reservations)


def _seeds_needed(found: np.ndarray, told: Prediction, alpha: float) -> int | None:
    """Seeds with which a difference as seen would be told from its border."""
    if len(found) < 2 or found.std() == 0.0:
        return None
    mean, sd = float(found.mean()), float(found.std(ddof=1))
    if told.expect == "equal" and abs(mean) < told.margin:
        return seeds_needed(lambda n: equivalence_power(mean, told.margin, sd, n, alpha))
    border = math.copysign(told.margin, mean) if told.expect == "equal" else told.margin * (-1 if told.expect == "lower" else 1)
    return seeds_needed(lambda n: power(mean - border, sd, n, alpha))


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _against(told: Prediction) -> str:
    if told.against_value is not None:
        return f"{told.against_value:g}"
    return told.against


def _words(pairs: Pairs, verdict: str, kind: str, numbers: dict, hint: tuple[str, ...], family: int) -> str:
    """The numbers, what the seeds could have seen, and what keeps it from being a verdict."""
    told, n = pairs.prediction, numbers["pairs"]
    if n == 0:
        return f"There is no pair to judge by: {_some(pairs.missing) or 'no run has ended'}."
    unit = UNITS[told.scale]
    said = [f"{told.metric} ({told.at}){unit}: {number(numbers['mean'], '+')}"]
    if n > 1:
        level, kind90 = ("90", "90") if told.expect == "equal" and verdict != REFUTED else ("95", "")
        ends = f"{number(numbers[f'low{kind90}'], '+')} to {number(numbers[f'high{kind90}'], '+')}"
        said[0] += f" ({level} % of {n} pairs: {ends}), {_p(numbers['p_holm'])}{' after Holm' if family > 1 else ''}"
    said[0] += f", where {_set(told)} was expected."
    if verdict == OPEN and n > 1:
        said.append(_what_would_tell(told, numbers))
    if pairs.missing:
        said.append(f"{numbers['planned'] - n} of {numbers['planned']} pairs are missing: {_some(pairs.missing)}.")
    if hint and kind != OPEN:
        said.append(f"A hint only: {', '.join(hint)}.")
    return " ".join(said)


def _some(reasons: Sequence[str], most: int = 3) -> str:
    more = len(reasons) - most
    return "; ".join([*reasons[:most], *([f"and {more} more runs"] if more > 0 else [])])


def _what_would_tell(told: Prediction, numbers: dict) -> str:
    n, needed = numbers["pairs"], numbers["seeds_needed"]
    seen = f"{n} seeds find {number(numbers['detectable'])} beyond the border with a chance of 80 %"
    if told.expect == "equal":
        seen = f"{n} seeds show a margin of {number(numbers['detectable'])} with a chance of 80 % where nothing differs"
    if needed is None:
        return f"{seen}; no number of seeds that could be paid would tell this difference from it."
    return f"{seen}; about {needed} would tell what was seen here{f', {needed - n} more' if needed > n else ''}."


def _set(told: Prediction) -> str:
    if told.expect == "equal":
        return f"at most ±{number(told.margin)}"
    sign, side = ("+", "above") if told.expect == "higher" else ("−", "below")
    return f"{side} {sign if told.margin else ''}{number(told.margin)}"


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {f'{value:.3f}'.lstrip('0')}" if value < 1 else "p = 1"


def number(value: float, sign: str = "") -> str:
    """Three decimals, or three digits where that would be nothing."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "–"
    if value == 0:
        return "0"
    told = f"{value:{sign}.3f}" if 0.01 <= abs(value) < 1000 else f"{value:{sign}.3g}"
    return told.replace("-", "−")


def headline(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each prediction, the verdict first."""
    return [f"{each.verdict[0].upper()}{each.verdict[1:]}: {each.says.rstrip('.')}. {each.words}" for each in verdicts]
