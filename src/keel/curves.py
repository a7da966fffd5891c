"""One picture of one run: did it learn, did it change how it answers, and was the training sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from keel.files import write_atomically, written

INK, FAINT, GRID = "#22303c", "#8795a1", "#e4e9ee"
BLUE, GREEN, AMBER, RED, VIOLET, TEAL = "#2f6fde", "#1b9e77", "#d98b0f", "#c8443c", "#7b5bd6", "#138a9e"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": GRID, "text.color": INK,
    "axes.labelcolor": FAINT, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": FAINT, "ytick.color": FAINT,
}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path, title: str) -> None:
    """Write the picture: reward, held-out pass@1 with its interval, completion length, entropy, engine gap, gradient
    norm.

    Args:
        rows: of `metrics.jsonl`.
        path: a PNG; replaced at once.
        title: one line above everything.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            panel(axes, rows)
            axes.set_xlim(0, max((row["step"] for row in rows), default=1) or 1)
        picture = BytesIO()
        figure.savefig(picture, format="png")
    with written(path.name, path.parent):
        write_atomically(path, picture.getvalue())


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which a metric was recorded; missing and non-finite ones are left out."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; at the ends over what is there."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _reward(axes: Axes, rows: Rows) -> None:
    frame(axes, "training reward", "mean over the batch; line = moving mean")
    _line(axes, *series(rows, "reward/mean"), BLUE, smoothed=True)


def _pass_at_1(axes: Axes, rows: Rows) -> None:
    frame(axes, "held-out pass@1", "with 95 % interval")
    steps, values = series(rows, "eval/pass@1")
    low, high = series(rows, "eval/pass@1_low")[1], series(rows, "eval/pass@1_high")[1]
    if len(low) == len(high) == len(steps):
        axes.fill_between(steps, low, high, color=GREEN, alpha=0.16, linewidth=0)
    axes.plot(steps, values, color=GREEN, linewidth=2, marker="o", markersize=4)
    for place, offset in ((0, (4, -12)), (-1, (-4, 7)))[: len(steps)]:
        axes.annotate(
            f"{values[place]:.2f}", (steps[place], values[place]), offset, textcoords="offset points",
            ha="left" if place == 0 else "right", color=GREEN, fontweight="bold",
        )  # fmt: skip
    axes.set_ylim(0, 1.03)


def _length(axes: Axes, rows: Rows) -> None:
    frame(axes, "completion length", "tokens, mean; dashed = share cut off")
    _line(axes, *series(rows, "length/mean"), AMBER, smoothed=True)
    axes.set_ylim(bottom=0)
    steps, values = series(rows, "length/truncated_frac")
    if any(values):
        twin = axes.twinx()
        twin.plot(steps, values, color=FAINT, linewidth=1, linestyle="--")
        twin.set_ylim(0, 1)
        twin.spines[:].set_visible(False)
        twin.tick_params(length=0)


def _entropy(axes: Axes, rows: Rows) -> None:
    frame(axes, "entropy of the policy", "nats a token")
    _line(axes, *series(rows, "policy/entropy_nats"), VIOLET, smoothed=True)
    axes.set_ylim(bottom=0)


def _gap(axes: Axes, rows: Rows) -> None:
    frame(axes, "engine gap", "max |logp − logp_rollout| in nats, log scale; dashed = 1e-4")
    steps, values = series(rows, "gap/max_abs_nats")
    axes.set_yscale("log")
    axes.axhline(1e-4, color=FAINT, linewidth=1, linestyle="--")
    _line(axes, steps, [max(value, 1e-9) for value in values], RED)


def _gradient(axes: Axes, rows: Rows) -> None:
    frame(axes, "gradient norm", "before clipping; crosses = skipped steps")
    steps, values = series(rows, "train/grad_norm")
    _line(axes, steps, values, TEAL, smoothed=True)
    lost = [row["step"] for row in rows if "train/grad_norm" in row and row["train/grad_norm"] is None]
    if lost:
        axes.plot(lost, [0] * len(lost), "x", color=RED, clip_on=False)
    axes.set_ylim(bottom=0)


PANELS = (_reward, _pass_at_1, _length, _entropy, _gap, _gradient)


def frame(axes: Axes, title: str, note: str, below: str = "step") -> None:
    """A title, a note below it, and no more lines than are needed."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=16)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=7.5, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(below, loc="right", fontsize=8)


def _line(axes: Axes, steps: Sequence[int], values: Sequence[float], colour: str, smoothed: bool = False) -> None:
    if smoothed and len(values) >= 10:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        values = smooth(values, max(3, len(values) // 12))
    axes.plot(steps, values, color=colour, linewidth=1.8)
