"""Curves as plotly figures: runs by themselves, or the arms of a study as means over seeds with intervals.

The x axis counts generated tokens, so that what costs more stands further right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from keel.report.data import Row, RunData
from keel.report.study import triple
from keel.summary import is_of_panel

COLOURS = ("#4c7fe0", "#d98b0f", "#2a9d74", "#d0554d", "#8b6fd8", "#2196a8", "#c65f9b", "#8795a1",
           "#a2783c", "#6d9b3a", "#5d66c9", "#b5838d")  # fmt: skip
TOKENS = "generated tokens"
POINTS = 60  # of a curve; steps in between are averaged
FLOOR = 1e-9  # on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One line of every figure: a run, or an arm's runs."""

    name: str
    runs: tuple[RunData, ...]
    colour: str


@dataclass(frozen=True)
class Panel:
    """One figure of curves.

    Args:
        names: metric → dash of its line ("solid", "dash", "dot").
        bounds: metrics of the lower and upper end of a single run's interval.
        log: a logarithmic axis; means and intervals are then those of logarithms.
        zero: the axis begins at 0.
        percent: a share that is told in percent.
        most: no value can be larger, and none smaller than 0: intervals are drawn up to there.
    """

    title: str
    note: str
    names: Mapping[str, str]
    bounds: tuple[str, str] | None = None
    log: bool = False
    zero: bool = True
    percent: bool = False
    most: float = math.inf

    def drawn(self, value: float) -> float:
        """A mean or an end of an interval, where the axis has it."""
        if not math.isfinite(value):
            return math.nan
        return 10**value if self.log else min(max(value, 0.0), self.most) if self.zero or self.most < math.inf else value


PANELS = (
    Panel("Held-out pass@1", "share of right answers", {"eval/pass@1": "solid", "eval/sampler/pass@1": "dot"},
          ("eval/pass@1_low", "eval/pass@1_high"), zero=False, most=1.0),
    Panel("Training reward", "mean of a batch", {"reward/mean": "solid"}, zero=False),
    Panel("Entropy", "nats a token", {"policy/entropy_nats": "solid"}),
    Panel("Length", "tokens: right solid, wrong dashed", {"length/right_mean": "solid", "length/wrong_mean": "dash"}),
    Panel("Cut off", "share of completions at the length cap", {"length/truncated_frac": "solid"}, percent=True, most=1.0),
    Panel("Engine gap", "largest |logp_old − logp_rollout| in nats", {"gap/max_abs_nats": "solid"}, log=True),
    Panel("Clip", "share of tokens at which the clip binds", {"policy/clip_frac": "solid"}, percent=True, most=1.0),
    Panel("Live groups", "share with right and wrong answers", {"group/live_frac": "solid"}, percent=True, most=1.0),
    Panel("Distance from the reference", "k3 in nats a token", {"kl/ref_k3_nats": "solid"}),
    Panel("Without a verdict", "share of completions", {"reward/unscorable_frac": "solid"}, percent=True, most=1.0),
    Panel("Gradient norm", "before clipping", {"train/grad_norm": "solid"}),
)  # fmt: skip
SILENT = {"reward/unscorable_frac", "length/truncated_frac"}  # not shown where they are 0 throughout


def series_of(runs: Sequence[RunData]) -> list[Series]:
    """Runs of a study by their arm, others one by one; colours in order."""
    by_name: dict[str, list[RunData]] = {}
    for run in runs:
        by_name.setdefault(run.arm or run.name, []).append(run)
    return [Series(name, tuple(of), COLOURS[n % len(COLOURS)]) for n, (name, of) in enumerate(by_name.items())]


def figures(runs: Sequence[RunData], arms: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """All figures that these runs have something for.

    Args:
        arms: of results.json, where there is one.
    """
    lines = series_of(runs)
    drawn = [_curves(panel, lines) for panel in PANELS]
    first = [*drawn[:1], _differences(lines, arms), _standing(lines, arms), _pass_at_k(lines), _panel(lines)]
    return [figure for figure in [*first, *drawn[1:]] if figure is not None]


def _differences(lines: Sequence[Series], arms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each arm against the first, as the results have it."""
    found = {str(row.get("arm")): triple(row.get("difference")) for row in arms[1:]}
    told = [(line, value) for line in lines if (value := found.get(line.name)) is not None]
    if not told:
        return None
    traces = [
        {"type": "scatter", "x": [value[0]], "y": [-row], "mode": "markers", "marker": {"color": line.colour, "size": 9},
         "name": line.name, "legendgroup": line.name, "error_x": _errors([value], line.colour),
         "hovertemplate": "%{x:+.3f}<extra>%{fullData.name}</extra>"}
        for row, (line, value) in enumerate(told)
    ]  # fmt: skip
    figure = _figure("Against the first arm", "difference of held-out pass@1, seed by seed", traces, "difference", zero=False)
    figure["layout"]["yaxis"] |= _named([line.name for line, _ in told])
    figure["layout"]["xaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    return figure


def _standing(lines: Sequence[Series], arms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Share of runs that have not collapsed, where any has."""
    found = {str(row.get("arm")): row.get("survival") or {} for row in arms}
    if not any(survival.get("steps") for survival in found.values()):
        return None
    traces = []
    for line in lines:
        last = max(run.step for run in line.runs)
        x, y = ([*map(float, found.get(line.name, {}).get(name) or ())] for name in ("steps", "share"))
        traces.append(
            {"type": "scatter", "x": [0, *x, last], "y": [1, *y, y[-1] if y else 1], "mode": "lines", "name": line.name,
             "line": {"color": line.colour, "width": 2, "shape": "hv"}, "legendgroup": line.name,
             "hovertemplate": "%{y:.0%} at step %{x}<extra>%{fullData.name}</extra>"}
        )  # fmt: skip
    return _figure("Still standing", "share of runs that have not collapsed", traces, "step")


def _named(labels: Sequence[str]) -> dict[str, Any]:
    """An axis with a name for each row, from above to below."""
    short = [label if len(label) < 24 else f"{label[:22]}…" for label in labels]
    rows = [-row for row in range(len(labels))]
    return {"tickmode": "array", "tickvals": rows, "ticktext": short, "zeroline": False, "range": [0.4 - len(labels), 0.6]}


def _curves(panel: Panel, lines: Sequence[Series]) -> dict[str, Any] | None:
    traces, seen = [], []
    for line in lines:
        for name, dash in panel.names.items():
            curves = [curve for run in line.runs if (curve := _curve(run.rows, name))]
            if not curves:
                continue
            seen += [y for curve in curves for _, _, y in curve]
            bounds = panel.bounds if len(line.runs) == 1 and name == next(iter(panel.names)) else None
            traces += _traced(line, curves, dash, panel, bounds)
    if not seen or (not any(seen) and SILENT & panel.names.keys()):
        return None
    flat = "0 at every step" if not any(seen) else ""
    figure = _figure(panel.title, panel.note, traces, TOKENS, log=panel.log, zero=panel.zero, flat=flat)
    figure["layout"]["yaxis"] |= {"tickformat": "~p"} if panel.percent else {}
    return figure


def _traced(
    line: Series, curves: Sequence[list[tuple[int, float, float]]], dash: str, panel: Panel, bounds: tuple[str, str] | None
) -> list[dict[str, Any]]:
    """The line of a metric, below it its interval: over seeds, or over the held-out prompts of a single run."""
    bins = _bins(curves)
    shared = _over_seeds([_binned(_logarithms(curve) if panel.log else curve, bins) for curve in curves])
    middle = list(shared.values())
    x = [p[1] for p in middle]
    y, low, high = ([panel.drawn(p[n]) for p in middle] for n in (2, 3, 4))
    if bounds:
        ends = [_curve(line.runs[0].rows, name) for name in bounds]
        if all(len(end) == len(curves[0]) for end in ends):
            low, high = ([p[2] for p in _binned(end, bins).values()] for end in ends)
    told = []
    if all(map(math.isfinite, [*low, *high])) and high != low:
        told.append(_band(line, x, low, high))
    text = [f"step {p[0]}" for p in middle]
    few, number = len(x) <= 20 and not panel.log, ".3~p" if panel.percent else ".4~g"
    told.append(
        {"type": "scatter", "x": x, "y": y, "text": text, "name": line.name, "legendgroup": line.name,
         "mode": "lines+markers" if few else "lines", "line": {"color": line.colour, "width": 2, "dash": dash},
         "marker": {"size": 5}, 
         "hovertemplate": f"%{{y:{number}}}<br>%{{text}}, %{{x:.3~s}} tokens<extra>%{{fullData.name}}</extra>"}
    )  # fmt: skip
    return told


def _logarithms(curve: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    return [(step, x, math.log10(max(y, FLOOR))) for step, x, y in curve]


def _band(line: Series, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    return {"type": "scatter", "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself", "mode": "lines",
            "fillcolor": _faint(line.colour), "line": {"width": 0}, "hoverinfo": "skip",
            "legendgroup": line.name, "name": line.name, "meta": "band"}  # fmt: skip


def _curve(rows: Sequence[Row], name: str) -> list[tuple[int, float, float]]:
    """(step, generated tokens so far, value) wherever a metric was measured."""
    return [
        (int(row["step"]), x, float(row[name])) for row, x in zip(rows, _tokens(rows), strict=True) if row.get(name) is not None
    ]


def _tokens(rows: Sequence[Row]) -> list[float]:
    """Generated tokens behind each step. A batch's tokens are told at its first update, and are shared out over its updates."""
    told: list[float] = []
    before = 0.0
    firsts = [n for n, row in enumerate(rows) if row.get("tokens/total") is not None]
    told += [0.0] * (firsts[0] if firsts else len(rows))
    for first, following in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        after, updates = float(rows[first]["tokens/total"]), following - first
        told += [before + (after - before) * (n + 1) / updates for n in range(updates)]
        before = after
    return told


def _bins(curves: Sequence[Sequence[tuple[int, float, float]]]) -> dict[int, int]:
    """step → its point on the axis, the same for all seeds: one each, or at most POINTS of neighbours."""
    steps = sorted({step for curve in curves for step, _, _ in curve})
    return {step: n * min(POINTS, len(steps)) // len(steps) for n, step in enumerate(steps)}


def _binned(curve: Sequence[tuple[int, float, float]], bins: Mapping[int, int]) -> dict[int, tuple[int, float, float]]:
    """Neighbours averaged, placed at their last step."""
    parts: dict[int, list[tuple[int, float, float]]] = {}
    for point in curve:
        parts.setdefault(bins[point[0]], []).append(point)
    return {place: (part[-1][0], part[-1][1], sum(y for _, _, y in part) / len(part)) for place, part in parts.items()}


def _over_seeds(curves: Sequence[Mapping[int, tuple[int, float, float]]]) -> dict[int, tuple[int, float, float, float, float]]:
    """(step, mean tokens, mean, low, high) wherever all seeds have something; seeds that are not as far yet shorten the curve."""
    told = {}
    for place in sorted(set(curves[0]).intersection(*curves[1:])):
        points = [curve[place] for curve in curves]
        mean, low, high = interval([y for _, _, y in points])
        told[place] = (max(step for step, _, _ in points), sum(x for _, x, _ in points) / len(points), mean, low, high)
    return told


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % t interval; for one value its ends are NaN."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan, math.nan
    half = _t95(n - 1) * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half


@lru_cache
def _t95(freedom: int) -> float:
    from keel.evaluate.estimates import t95  # it comes with all that evaluating needs

    return t95(freedom)


def _pass_at_k(lines: Sequence[Series]) -> dict[str, Any] | None:
    """Before dotted, after solid, over k."""
    ks = sorted({int(name[10:]) for line in lines for run in line.runs for row in run.rows for name in row if _is_pass(name)})
    if len(ks) < 2:
        return None
    traces = []
    for line in lines:
        for place, dash in ((0, "dot"), (-1, "solid")):
            found = [(k, _mean_end(line.runs, f"eval/pass@{k}", place)) for k in ks]
            x, y = [k for k, v in found if v is not None], [v for _, v in found if v is not None]
            traces.append(
                {"type": "scatter", "x": x, "y": y, "mode": "lines+markers", "name": line.name, "legendgroup": line.name,
                 "line": {"color": line.colour, "width": 2, "dash": dash}, "marker": {"size": 5},
                 "hovertemplate": f"pass@%{{x}} %{{y:.3f}}, {'before' if place == 0 else 'after'}<extra>%{{fullData.name}}</extra>"}
            )  # fmt: skip
    figure = _figure("pass@k", "before dotted, after solid", traces, "k", zero=False)
    figure["layout"]["xaxis"] = {
        "title": {"text": "k"},
        "type": "log",
        "tickmode": "array",
        "tickvals": ks,
        "ticktext": list(map(str, ks)),
    }
    return figure


def _is_pass(name: str) -> bool:
    return name.startswith("eval/pass@") and name[10:].isdigit()


def _mean_end(runs: Sequence[RunData], name: str, place: int) -> float | None:
    ends = [curve[place][2] for run in runs if (curve := _curve(run.rows, name))]
    return sum(ends) / len(ends) if ends else None


def _panel(lines: Sequence[Series]) -> dict[str, Any] | None:
    """Other skills, before (hollow) and after (filled), with intervals."""
    names = dict.fromkeys(
        name for line in lines for run in line.runs for row in run.rows for name in row if is_of_panel(name)
    )  # fmt: skip
    if not names:
        return None
    traces = []
    for n, line in enumerate(lines):
        rise = (n - (len(lines) - 1) / 2) * min(0.16, 0.7 / len(lines))
        for place, symbol in ((0, "circle-open"), (-1, "circle")):
            points = [(row, name, _panel_end(line.runs, name, place)) for row, name in enumerate(names)]
            points = [(row + rise, name, end) for row, name, end in points if end is not None]
            traces.append(
                {"type": "scatter", "x": [end[0] for _, _, end in points], "y": [-row for row, _, _ in points], "mode": "markers",
                 "text": [name.removeprefix("eval/").removesuffix("/pass@1") for _, name, _ in points],
                 "marker": {"color": line.colour, "size": 8, "symbol": symbol}, "name": line.name, "legendgroup": line.name,
                 "error_x": _errors([end for _, _, end in points], line.colour) if place else {},
                 "hovertemplate": f"%{{text}} %{{x:.3f}}, {'before' if place == 0 else 'after'}<extra>%{{fullData.name}}</extra>"}
            )  # fmt: skip
    figure = _figure("Other skills", "pass@1: before hollow, after filled", traces, "pass@1", zero=False)
    labels = [name.removeprefix("eval/").removesuffix("/pass@1") for name in names]
    figure["layout"]["yaxis"] |= _named(labels)
    return figure


def _panel_end(runs: Sequence[RunData], name: str, place: int) -> tuple[float, float, float] | None:
    """A skill's number at one end, and its interval: over seeds, or of the only run's prompts."""
    ends = [curve[place][2] for run in runs if (curve := _curve(run.rows, name))]
    if not ends:
        return None
    if len(ends) > 1:
        mean, low, high = interval(ends)
        return mean, max(low, 0.0), min(high, 1.0)
    low, high = (
        next((c[place][2] for run in runs if (c := _curve(run.rows, f"{name}_{end}"))), math.nan) for end in ("low", "high")
    )
    return ends[0], low, high


def _errors(ends: Sequence[tuple[float, float, float]], colour: str) -> dict[str, Any]:
    over = [max(0.0, high - mean) if math.isfinite(high) else 0 for mean, _, high in ends]
    under = [max(0.0, mean - low) if math.isfinite(low) else 0 for mean, low, _ in ends]
    return {"type": "data", "symmetric": False, "array": over, "arrayminus": under, "color": _faint(colour, 0.5), "thickness": 1.5,
            "width": 0}  # fmt: skip


def _figure(
    title: str, note: str, traces: list[dict[str, Any]], x: str, *, log: bool = False, zero: bool = True, flat: str = ""
) -> dict[str, Any]:
    y_axis: dict[str, Any] = {"type": "log", "tickformat": "~e"} if log else {"exponentformat": "e"}
    if zero and not log:
        y_axis["rangemode"] = "tozero"
    x_axis: dict[str, Any] = {"title": {"text": x}} | ({"rangemode": "tozero"} if x == TOKENS else {})
    return {"title": title, "note": note, "flat": flat, "data": traces, "layout": {"xaxis": x_axis, "yaxis": y_axis}}


def _faint(colour: str, alpha: float = 0.15) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
