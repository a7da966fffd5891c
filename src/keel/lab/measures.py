"""What a run logged, as series, and the one number that a prediction takes from each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keel.lab.compute import misses
from keel.lab.predictions import At
from keel.lab.study import Collapse

LAST = 10  # the end of what is logged at every step is its last tenth


class Point(NamedTuple):
    """One logged value: at which optimizer step, and after how many generated tokens."""

    step: int
    tokens: float
    value: float


Series = tuple[Point, ...]


def series(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Series]:
    """What was logged under each name, in order. null stands for NaN in an evaluation; elsewhere nothing could be measured."""
    tokens, found = 0.0, {name: [] for name in names}
    for row in rows:
        tokens = float(row.get("tokens/total") or tokens)
        for name, points in found.items():
            value = row.get(name)
            if value is not None or (name in row and name.startswith("eval/")):
                points.append(Point(int(row["step"]), tokens, math.nan if value is None else float(value)))
    return {name: tuple(points) for name, points in found.items()}


def value_at(points: Series, name: str, at: At, validation: Series = (), tokens: float = math.nan) -> float:
    """The number that stands for a run; NaN where there is none. Values that are not finite make it NaN, except at other places.

    Args:
        points: of the metric `name`.
        at: see predictions.AT.
        validation: eval/pass@1, by which `best-on-validation` chooses the step: the first of equals.
        tokens: at which `equal-tokens` looks, between two points on the line through them.
    """
    if not points:
        return math.nan
    values = np.array([point.value for point in points])
    match at:
        case "end":
            return float(_end(values, name))
        case "mean":
            return float(values.mean())
        case "best":
            return float(values.max())
        case "area":
            return mean_over_tokens(points)
        case "change":
            return float(_end(values, name) - values[0])
        case "fall":
            return float(values.max() - _end(values, name))
        case "equal-tokens":
            return float(np.interp(tokens, [point.tokens for point in points], values))
        case "best-on-validation":
            return _chosen(points, validation)
        case "sigmoid-miss" | "standing-miss":
            tokens_so_far = np.array([point.tokens for point in points])
            return misses(tokens_so_far, values)[at == "standing-miss"]


def _end(values: np.ndarray, name: str) -> np.floating:
    return values[-1] if name.startswith("eval/") else values[-max(1, len(values) // LAST) :].mean()


def mean_over_tokens(points: Series) -> float:
    """Area under the curve over generated tokens, divided by their number: the plain value where none were generated."""
    tokens, values = (np.array([getattr(point, name) for point in points]) for name in ("tokens", "value"))
    width = tokens[-1] - tokens[0]
    return float(np.trapezoid(values, tokens) / width) if width > 0 else float(values.mean())


def _chosen(points: Series, validation: Series) -> float:
    if not validation:
        return math.nan
    best = max(validation, key=lambda point: point.value)
    return next((point.value for point in points if point.step == best.step), math.nan)


def collapsed_at(points: Sequence[float], rule: Collapse) -> int | None:
    """The place of the first evaluation of a collapse; None without one."""
    best, below = -math.inf, 0
    for place, value in enumerate(points):
        if not math.isfinite(value):
            return place
        best = max(best, value)
        below = below + 1 if value < rule.share * best else 0
        if below == rule.evaluations:
            return place - below + 1
    return len(points) - below if below else None
