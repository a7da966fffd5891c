"""What a run came to, from its rows alone: so a run that was resumed tells the same as one that never stopped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
Ends = tuple[float, float, float]  # a share and its 95 % interval
WHEN = ("before", "after")
Moved = Literal["rose", "fell", "same", ""]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of `summary.json`; its keys are kept stable.

    Returns:
        eval: name → {before, after} for every held-out number; panel: task → {before, after} of its pass@1, and where both have
            intervals {change, low, high}: after − before with its 95 % interval.
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
    return "".join(letter if letter.isalnum() or letter in "_.:@-" else "-" for letter in task)


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
            panel["/".join(between)] = _of_panel(rows, name.removesuffix("/pass@1"))
    return told | {"panel": panel}


def _of_panel(rows: Sequence[Row], metric: str) -> dict[str, float | None]:
    skill = skill_of(rows, metric)
    told = {"before": skill.before and skill.before[0], "after": skill.after and skill.after[0]}
    change = skill.change
    return told | (dict(zip(("change", "low", "high"), change, strict=True)) if change else {})


def _largest(rows: Iterable[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return max((abs(value) for value in values if math.isfinite(value)), default=None)


# ── skills that were not trained ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Skill:
    """One skill's pass@1 before and after training; None where it was not measured, NaN for an end that is not known."""

    name: str
    before: Ends | None
    after: Ends | None

    @property
    def change(self) -> Ends | None:
        """after − before; None where an interval is missing."""
        if self.before is None or self.after is None or not math.isfinite(self.before[1] + self.after[1]):
            return None
        return difference(self.before, self.after)

    @property
    def moved(self) -> Moved:
        """What its interval, taken by itself, says; "" where there is none."""
        return moved(self.change)


def skills_of(rows: Sequence[Row]) -> list[Skill]:
    """The panel's skills, in the order in which they were first measured."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [skill_of(rows, name.removesuffix("/pass@1")) for name in names if is_of_panel(name)]


def is_of_panel(name: str) -> bool:
    """Whether a metric is a skill's pass@1: of neither the trained task nor the engine alone."""
    return name.startswith("eval/") and name.endswith("/pass@1") and name.count("/") > 1 and not name.startswith("eval/sampler/")


def against(before: Row, after: Row, task: str) -> dict[str, dict[str, float | None]]:
    """The trained task's and each skill's pass@1 in two evaluations, as `summarise` tells the panel; empty without the first."""
    rows = [{**before, "step": 0}, {**after, "step": 1}]
    skills = [name.removesuffix("/pass@1") for name in after if is_of_panel(name)]
    return {skill_of(rows, each).name or task: _of_panel(rows, each) for each in ("eval", *skills)} if before else {}


def skill_of(rows: Iterable[Row], metric: str) -> Skill:
    """One skill by its metrics' beginning, such as "eval/skills:sort"; "eval" is the trained task.

    Before is what was measured before the first step, after what was measured last.
    """
    found = [row for row in rows if row.get(f"{metric}/pass@1") is not None]
    before = _with_ends(found[0], metric) if found and not found[0].get("step") else None
    after = _with_ends(found[-1], metric) if found and found[-1].get("step") else None
    return Skill(metric.removeprefix("eval").removeprefix("/"), before, after)


def _with_ends(row: Row, metric: str) -> Ends:
    mean, low, high = (row.get(f"{metric}/pass@1{end}") for end in ("", "_low", "_high"))
    return float(mean), *(math.nan if end is None else float(end) for end in (low, high))


def difference(before: Ends, after: Ends) -> Ends:
    """after − before of two shares, with its 95 % interval from theirs.

    after − before ∓ √((end of after)² + (other end of before)²), the ends as distances from their means. The two are taken as
    independent. The same prompts and draws before and after make them alike, so the interval is rather too wide.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 873–890, method 10. Differs from it: in whose intervals are joined.
    """
    mean = after[0] - before[0]
    down = math.hypot(after[0] - after[1], before[2] - before[0])
    up = math.hypot(after[2] - after[0], before[0] - before[1])
    return mean, mean - down, mean + up


def moved(change: Ends | None) -> Moved:
    """What a change's interval, taken by itself, says; "" where there is none."""
    if change is None:
        return ""
    return "rose" if change[1] > 0 else "fell" if change[2] < 0 else "same"


# ── the closing words ─────────────────────────────────────────────────────────────────────────────────────────────────


def closing_table(summary: Mapping[str, Any]) -> Table:
    """What a run came to, before and after; other skills with their change."""
    table = _headed("held out")
    evaluation = {name: ends for name, ends in summary["eval"].items() if name != "panel"}
    low, high = (evaluation.pop(f"pass@1_{end}", {}) for end in ("low", "high"))
    for name, ends in evaluation.items():
        known = name == "pass@1" and low and high
        table.add_row(name, *(_short(ends[when]) for when in WHEN), _changed(_change(ends, low, high)) if known else "")
        if known:
            table.add_row("  95 %", *(f"{_short(low[when])} – {_short(high[when])}" for when in WHEN))
    panel = dict(summary["eval"]["panel"])
    if engine := panel.pop("sampler", None):
        table.add_row("engine's own pass@1", *(_short(engine[when]) for when in WHEN))
    _add_skills(table, panel)
    for name in ("steps", "tokens", "seconds", "clip_frac_max", "gap_max_abs_nats"):
        table.add_row(name, "", _short(summary[name]))
    return table


def skills_table(panel: Mapping[str, Mapping[str, float | None]]) -> Table:
    """What became of other skills."""
    table = _headed("pass@1")
    _add_skills(table, panel)
    return table


def _headed(first: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (first, *WHEN, "change (95 %)"):
        table.add_column(heading, justify="left" if heading == first else "right")
    return table


def _add_skills(table: Table, panel: Mapping[str, Mapping[str, float | None]]) -> None:
    if panel and table.row_count:
        table.add_row("other skills, pass@1")
    for task, ends in panel.items():
        change = None if ends.get("change") is None else (ends["change"], ends["low"], ends["high"])
        table.add_row(f"  {task}", *(_short(ends[when]) for when in WHEN), _changed(change))


def _change(*ends: Mapping[str, float | None]) -> Ends | None:
    before, after = (tuple(end[when] for end in ends) for when in WHEN)
    return None if None in (*before, *after) else difference(before, after)


def _changed(change: Ends | None) -> str:
    """A change in words: "-0.12 (-0.18 – -0.06) fell"; "" where it is not known."""
    if change is None:
        return ""
    verdict = {"same": "    "}.get(moved(change), moved(change))
    return f"{change[0]:+.2f} ({change[1]:+.2f} – {change[2]:+.2f}) {verdict}"


def _short(value: int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.1f}"
