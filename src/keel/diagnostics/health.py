"""Numbers that cannot be: a step's metrics against what each of them means. Pure.

Every rule is an identity (a share lies in [0, 1], k3 is never negative) or compares numbers of the same step that must agree, so
nothing here has a threshold but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from keel.diagnostics.metrics import METRICS
from keel.types import Group

ROUNDING = 1e-6  # relative; of sums of a batch in 32-bit numbers
Row = Mapping[str, float]


@dataclass(frozen=True)
class Impossible:
    """One number that cannot be.

    Args:
        metric: its name.
        value: as written.
        why: what it would have to be.
    """

    metric: str
    value: float
    why: str


def impossible(row: Row) -> list[Impossible]:
    """Everything in one step's metrics that cannot be."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return [*_alone(numbers), *(found for rule in TOGETHER for found in rule(numbers))]


def _alone(row: Row) -> Iterator[Impossible]:
    for name, value in row.items():
        if math.isnan(value) and name.startswith("eval/"):  # a mean of nothing
            continue
        if not math.isfinite(value):
            if name != "train/grad_norm" or not row.get("train/skipped_steps"):  # a step that was skipped says so itself
                yield Impossible(name, value, "must be a finite number")
            continue
        low, high = _range(name)
        if value < low - ROUNDING or value > high + ROUNDING * max(1.0, abs(high)):
            yield Impossible(name, value, f"lies between {low:g} and {high:g}")


@cache
def _range(name: str) -> tuple[float, float]:
    """Lowest and highest value that a metric can have."""
    unit = UNITS.get(name) or next((m.unit for m in METRICS if m.matches(name)), "")
    if name in SIGNED:
        return SIGNED[name]
    if unit in ("share", "0 or 1"):
        return 0.0, 1.0
    if unit in COUNTED or name.endswith(NEVER_BELOW):
        return 0.0, math.inf
    return -math.inf, math.inf


UNITS = {m.name: m.unit for m in METRICS}
COUNTED = {"tokens", "completions", "groups", "steps", "versions", "prompts", "requests", "questions", "rounds", "epochs"}
COUNTED |= {"s", "MB", "tokens/s", "norm", "ratio"}
NEVER_BELOW = ("k3_nats", "entropy_nats", "max_abs_nats", "_max_abs", "/std", "abs_max", "chi2", "old_kl_nats")
SIGNED = {"policy/logp_mean_nats": (-math.inf, 0.0), "gap/pearson": (-1.0, 1.0)}


def _groups(row: Row) -> Iterator[Impossible]:
    shares = [row.get(f"group/{name}_frac") for name in ("live", "all_right", "all_wrong")]
    if None not in shares and abs(sum(shares) - 1.0) > ROUNDING:
        yield Impossible("group/live_frac", shares[0], "and the shares of all-right and all-wrong groups add up to 1")
    low, high = row.get("group/size_min"), row.get("group/size_max")
    if low is not None and high is not None and low > high:
        yield Impossible("group/size_min", low, f"is at most the largest group's size, {high:g}")


def _lengths(row: Row) -> Iterator[Impossible]:
    mean, longest = row.get("length/mean"), row.get("length/max")
    if mean is not None and longest is not None and mean > longest * (1 + ROUNDING):
        yield Impossible("length/mean", mean, f"is at most the longest completion, {longest:g}")


def _means(row: Row) -> Iterator[Impossible]:
    for mean, largest in (("gap/mean_nats", "gap/max_abs_nats"), ("policy/log_ratio_mean_nats", "policy/log_ratio_max_abs")):
        if mean in row and largest in row and abs(row[mean]) > row[largest] * (1 + ROUNDING) + ROUNDING:
            yield Impossible(mean, row[mean], f"is no further from 0 than the largest of them, {row[largest]:g}")


TOGETHER: tuple[Callable[[Row], Iterator[Impossible]], ...] = (_groups, _lengths, _means)


def contradictions(groups: Sequence[Group], group_size: int) -> list[Impossible]:
    """What a batch's groups cannot be: of another size than was asked for, one prompt twice, one text with two verdicts."""
    sizes = [len(group.completions) for group in groups if len(group.completions) != group_size]
    ids = [group.prompt.id for group in groups]
    found = []
    if sizes:
        found.append(Impossible("group/size", float(sizes[0]), f"is {group_size} for every group"))
    if len(set(ids)) < len(ids):
        found.append(Impossible("group/count", float(len(ids)), f"counts each prompt once, and there are {len(set(ids))}"))
    torn = sum(_torn(group) for group in groups)
    if torn:
        found.append(Impossible("reward/verdicts", float(torn), "is the same for the same text of the same prompt"))
    return found


def _torn(group: Group) -> bool:
    """Whether two completions of the same tokens have different scores."""
    seen: dict[tuple[str, str], float | None] = {}
    for completion, score in zip(group.completions, group.scores, strict=True):
        if score.scorable and seen.setdefault((completion.text, completion.finish), score.value) != score.value:
            return True
    return False
