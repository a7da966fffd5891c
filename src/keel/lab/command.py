"""`keel study`: run the arms of a study, and print what they came to."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.files import write_atomically
from keel.lab.differences import check_folder
from keel.lab.results import compact, results
from keel.lab.runner import jobs_of, run_jobs, write_plan
from keel.lab.study import Arm, Study, load_study, shipped_studies


def run(
    source: str | None,
    *,
    out: str = "",
    seeds: int | None = None,
    quick: bool = False,
    workers: int = 2,
    plan_only: bool = False,
    as_json: bool = False,
) -> int:
    """Run a study to its end, or go on with it; without a source, list those that are shipped."""
    if source is None:
        for name, path in shipped_studies().items():
            print(f"{name:<24} {load_study(str(path)).question}")
        return 0
    study = load_study(source)
    arms = study.resolved_arms(quick)
    count = study.seeds_for(seeds, quick)
    place = Path(out or f"runs/study-{study.name}{'-quick' if quick else ''}")
    jobs = jobs_of(study, arms, place, count)
    if plan_only or not as_json:
        print(described(study, arms, count))
    if plan_only:
        return 0
    for job in jobs:
        check_folder(job.out, job.config)
    registered = write_plan(study, arms, jobs, place)
    run_jobs(jobs, workers, lambda text: print(text, file=sys.stderr, flush=True))
    found = results(study, jobs, quick, registered)
    told = compact(found.record(study, count, quick))
    write_atomically(place / "results.json", told)
    print(told if as_json else "\n".join([*found.headline, *[""] * bool(found.headline), tabulated(found.rows), *found.notes]))
    return 1 if any(row["failed"] for row in found.rows) else 0


def described(study: Study, arms: Sequence[Arm], seeds: int) -> str:
    """The question, and in what exactly each arm differs."""
    lines = [study.question, *(f"{name}: {text}" for name in ("source", "prediction") if (text := getattr(study, name)))]
    lines += [f"predicted: {each.says}" for each in study.predictions]
    lines += [f"{len(arms)} arms × {seeds} seeds:"]
    return "\n".join([*lines, *(f"  {arm.name:<32} {_changes(arm.difference)}" for arm in arms), ""])


def _changes(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in changes.items()) or "the base"


def tabulated(rows: Sequence[dict[str, Any]]) -> str:
    """Arms as lines: means with 95 % t intervals over seeds."""
    width = max(len(row["arm"]) for row in rows)
    head = f"{'arm':<{width}}  {'pass@1':^20}  {'sampler':^20}  {'against the first':^23}  collapsed  k3 gap"
    lines = [
        f"{row['arm']:<{width}}  {_interval(row['pass@1'])}  {_interval(row['sampler pass@1'])}  "
        f"{_interval(row['difference'], '+')}  {row['collapsed']:>4} of {row['runs']:<2}  {_plain(row.get('gap/k3_nats'))}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _interval(value: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = value
    if not math.isfinite(mean):
        return f"{'-':^20}"
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _plain(value: tuple[float, float, float] | None) -> str:
    return "-" if value is None or not math.isfinite(value[0]) else f"{value[0]:.2g}"
