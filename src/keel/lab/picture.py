"""A small picture of what a study came to: each arm's mean curve, and where its runs ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

MOST_CURVES = 13  # of more arms only the ends are shown
COLOURS = "viridis"


def picture(record: Mapping[str, Any]) -> bytes:
    """A PNG of a study's record (of `Results.record`): on the left held-out pass@1, means over seeds; on the right where its runs
    ended, a dot each, with the 95 % t interval of their mean.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from keel.curves import STYLE, frame

    arms = record["arms"]
    colours = colormaps[COLOURS](np.linspace(0.0, 0.9, len(arms)))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 1.3 + 0.19 * max(len(arms), 7)), dpi=90, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
        frame(left, "held-out pass@1", "mean over seeds")
        frame(right, "at the end", "mean with 95 % interval; dots are runs", below="")
        for place, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
            if len(arms) <= MOST_CURVES:
                left.plot(*mean_curve(arm["curves"]), color=colour, linewidth=1.5)
            _ends(right, place, arm, colour)
        right.set_yticks(range(len(arms)), [arm["arm"] for arm in arms], fontsize=7.5)
        right.set_ylim(len(arms) - 0.5, -0.5)
        out = BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ends(axes: Any, place: int, arm: Mapping[str, Any], colour: Any) -> None:
    mean, low, high = (math.nan if value is None else value for value in arm["pass@1"])
    ends = [curve[-1][2] for curve in arm["curves"].values() if curve and curve[-1][2] is not None]
    axes.plot(ends, [place] * len(ends), ".", color=colour, alpha=0.35, markersize=4)
    axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
    axes.plot([mean], [place], "o", color=colour, markersize=5)
    axes.grid(axis="x")


def mean_curve(curves: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Steps that some run was evaluated at, and the mean over the runs that were."""
    of: dict[int, list[float]] = {}
    for curve in curves.values():
        for step, _, value in curve:
            if value is not None:
                of.setdefault(step, []).append(value)
    return sorted(of), [sum(of[step]) / len(of[step]) for step in sorted(of)]
