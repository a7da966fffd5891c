"""The reliability plot: how right answers truly are, by the value of their verdict."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from keel.files import write_atomically, written
from keel.grade.report import Report

COLOURS = ("#2f6fde", "#1b9e77", "#d98b0f", "#c8443c", "#7b5bd6", "#138a9e")


def draw(report: Report, path: Path) -> None:
    """Write the picture; graders without labels are not in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#e4e9ee", zorder=0)
    for number, each in enumerate(report.graders):
        bins = each.accuracy.reliability if each.accuracy else ()
        colour = COLOURS[number % len(COLOURS)]
        value, truth = [b.value for b in bins], [b.truth.mean for b in bins]
        spread = [[b.truth.mean - b.truth.low for b in bins], [b.truth.high - b.truth.mean for b in bins]]
        axes.errorbar(value, truth, yerr=spread, color=colour, marker="o", capsize=3, label=each.name, alpha=0.8)
        for b in bins:
            axes.annotate(
                str(b.truth.of), (b.value, b.truth.mean), textcoords="offset points", xytext=(6, 4), fontsize=7, color=colour
            )
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xlabel="value of the verdict", ylabel="truth: share right, or mean label")
    axes.set_title("Reliability: a reward means what it says on the line", fontsize=10, loc="left")
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    with written(path.name, path.parent):
        write_atomically(path, picture.getvalue())
