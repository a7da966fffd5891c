"""The table of generalisation and forgetting: what was trained, and what was not, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keel.report.data import RunData
from keel.report.figures import Series, interval
from keel.report.words import share, signed
from keel.summary import Ends, Skill, is_of_panel, moved, skill_of

TONES = {"rose": "good", "fell": "bad"}


def skills_table(lines: Sequence[Series]) -> dict[str, Any] | None:
    """One row for each skill, first the trained task's own; one cell for each run or arm. None where no other skill was measured.

    Returns:
        columns: names of the runs or arms; rows: each with its name, whether it was trained, and cells of {before, after, change,
        verdict, tone}, all text.
    """
    found = dict.fromkeys(name for line in lines for run in line.runs for row in run.rows for name in row if is_of_panel(name))
    if not found:
        return None
    metrics = ["eval", *(name.removesuffix("/pass@1") for name in found)]
    return {"columns": [line.name for line in lines], "rows": [_row(lines, metric) for metric in metrics]}


def _row(lines: Sequence[Series], metric: str) -> dict[str, Any]:
    trained = metric == "eval"
    tasks = dict.fromkeys(str(run.config.get("task", "–")) for line in lines for run in line.runs)
    name = ", ".join(tasks) if trained else metric.removeprefix("eval/")
    return {"name": name, "trained": trained, "cells": [_cell(line.runs, metric) for line in lines]}


def _cell(runs: Sequence[RunData], metric: str) -> dict[str, str]:
    """A run's numbers; of several seeds their means, and the change seed by seed."""
    skills = [skill_of(run.rows, metric) for run in runs]
    change = skills[0].change if len(skills) == 1 else _over_seeds(skills)
    verdict = moved(change)
    return {
        "before": share(_mean([skill.before for skill in skills])),
        "after": share(_mean([skill.after for skill in skills])),
        "change": f"{signed(change[0])} ({signed(change[1])} to {signed(change[2])})" if change else "",
        "verdict": {"same": "within its interval"}.get(verdict, verdict),
        "tone": TONES.get(verdict, ""),
    }


def _over_seeds(skills: Sequence[Skill]) -> Ends | None:
    both = [(skill.before[0], skill.after[0]) for skill in skills if skill.before and skill.after]
    return interval([after - before for before, after in both]) if len(both) > 1 else None


def _mean(ends: Sequence[Ends | None]) -> float:
    known = [end[0] for end in ends if end is not None]
    return sum(known) / len(known) if known else math.nan
