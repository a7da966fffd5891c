"""What a run came to, from its rows alone: so a run that was resumed tells the same as one that never stopped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of `summary.json`; its keys are kept stable.

    Returns:
        eval: name → {before, after} for every held-out number; panel: task → {before, after} of its pass@1.
        clip_frac_max, gap_max_abs_nats, off_policy_frac_max: the largest over all steps; None where never measured.
        steps, tokens (completion tokens generated), skipped_steps, seconds.
    """
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    return {
        "eval": _evaluations(rows),
        "clip_frac_max": _largest(rows, "policy/clip_frac"),
        "gap_max_abs_nats": _largest(rows, "gap/max_abs_nats"),
        "off_policy_frac_max": _largest(rows, "policy/off_policy_frac"),
        "steps": last.get("step", 0),
        "tokens": last.get("tokens/total", 0),
        "skipped_steps": int(last.get("train/skipped_steps", 0)),
        "seconds": round(last.get("time/total_s", 0.0), 2),
    }


def panel_name(task: str) -> str:
    """A task's spec as it stands in a metric's name."""
    return "".join(letter if letter.isalnum() or letter in "_.:-" else "-" for letter in task)


def _evaluations(rows: Sequence[Row]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    told: dict[str, Any] = {}
    panel: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        ends = {"before": values[0], "after": values[-1]} if values else {"before": None, "after": None}
        _, *between, leaf = name.split("/")
        if not between:
            told[leaf] = ends
        elif leaf == "pass@1":
            panel["/".join(between)] = ends
    return told | {"panel": panel}


def _largest(rows: Iterable[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return max((abs(value) for value in values if math.isfinite(value)), default=None)
