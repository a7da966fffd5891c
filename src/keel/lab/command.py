"""`keel study`: run the arms of a study, and print what they came to."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keel.files import write_atomically
from keel.lab.differences import check_folder
from keel.lab.kept import check_keep, keep_results
from keel.lab.results import Results, compact, results
from keel.lab.runner import Job, build, jobs_of, run_jobs, write_plan
from keel.lab.study import Arm, Study, load_study, shipped_studies
from keel.lab.sweep import chosen, jobs_of_sweep, swept_arms


def run(
    source: str | None,
    *,
    out: str = "",
    seeds: int | None = None,
    quick: bool = False,
    workers: int | None = None,
    ray: str = "",
    plan_only: bool = False,
    as_json: bool = False,
    judge_only: bool = False,
    keep: str = "",
) -> int:
    """Run a study to its end, or go on with it; without a source, list those that are shipped.

    Args:
        workers: runs at a time; None = two, or with Ray as many as the cluster holds.
        ray: address of the Ray cluster that they run on; "" = processes of this machine.
        keep: a folder for results of studies, from which a ledger is made; without a source that ledger is printed.
        plan_only: print the arms and stop.
        judge_only: start no run, and judge by those that have ended.
    """
    if source is None and keep:
        return _ledger(Path(keep))
    if source is None:
        for name, path in shipped_studies().items():
            study = load_study(str(path))
            print(f"{name:<17} {'' if study.hours is None else f'{study.hours:.1f} h':>6}  {study.question}")
        return 0
    study = load_study(source)
    arms = study.resolved_arms(quick)
    count = study.seeds_for(seeds, quick)
    place = Path(out or f"runs/study-{study.name}{'-quick' if quick else ''}")
    if keep:
        check_keep(study.name, Path(keep), quick)
    print(described(study, arms, count, quick), file=sys.stdout if plan_only else sys.stderr)
    if plan_only:
        return 0
    found = run_study(study, arms, place, count, 0 if judge_only else workers, quick, ray)
    again = f"keel study {source}{' --quick' * quick}{f' --seeds {count}' * (count != study.seeds_for(None, quick))}"
    record = found.record(study, count, quick, again)
    write_atomically(place / "results.json", told := compact(record))
    print(told if as_json else in_words(found))
    if keep:
        print(f"Kept as {keep_results(record, Path(keep))}.", file=sys.stderr)
    print(f"A page of it, with what the models said: keel report {place}", file=sys.stderr)
    return 1 if any(row["failed"] for row in found.rows) else 0


def _ledger(folder: Path) -> int:
    from keel.lab.ledger import ledger

    print(ledger(folder), end="")
    return 0


def run_study(
    study: Study, arms: Sequence[Arm], place: Path, seeds: int, workers: int | None = None, quick: bool = False, ray: str = ""
) -> Results:
    """Everything between a plan and what it came to: the sweep if there is one, then every arm under every seed.

    Args:
        workers, ray: as `run_jobs` takes them; with 0 workers no run is started, and those on disk are judged.
    """
    trials = jobs_of_sweep(study, arms, place)
    registered = write_plan(study, arms, jobs_of(study, arms, place, seeds), place)
    if workers != 0:
        build(study, place, _say)
    _run(trials, workers, ray)
    swept = chosen(study, arms, trials)
    arms = swept_arms(arms, swept)
    jobs = jobs_of(study, arms, place, seeds)
    _run(jobs, workers, ray)
    return replace(results(study, jobs, quick, registered), sweep=tuple(swept))


def _run(jobs: Sequence[Job], workers: int | None, ray: str) -> None:
    for job in jobs:
        check_folder(job.out, job.config)
    if jobs and workers != 0:
        run_jobs(jobs, workers, _say, ray)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def in_words(found: Results) -> str:
    """The verdicts first, then the arms, then what else must be known."""
    sweep = [each.words for each in found.sweep]
    return "\n".join([*found.headline, *[""] * bool(found.headline), tabulated(found.rows), *sweep, *found.notes])


def described(study: Study, arms: Sequence[Arm], seeds: int, quick: bool = False) -> str:
    """The question, and in what exactly each arm differs."""
    lines = [study.question, *(f"{name}: {text}" for name in ("source", "prediction") if (text := getattr(study, name)))]
    lines += [f"predicted: {each.says}" for each in study.predictions]
    lines += [f"{len(arms)} arms × {seeds} seeds{'' if quick else _duration(study, seeds)}:"]
    for setting, values in study.sweep.items():
        told = ", ".join(f"{value:g}" for value in values)
        lines += [f"(before that each arm tries {setting} = {told} on {study.sweep_seeds} other seeds and takes the best one)"]
    return "\n".join([*lines, *(f"  {arm.name:<32} {_changes(arm.difference)}" for arm in arms), ""])


def _duration(study: Study, seeds: int) -> str:
    """What to expect of the full size, by what it took before."""
    if study.hours is None:
        return ""
    return f", about {study.hours * seeds / study.seeds:.1f} hours of one process in all"


def _changes(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in changes.items()) or "the base"


def tabulated(rows: Sequence[dict[str, Any]]) -> str:
    """Arms as lines: means with 95 % t intervals over seeds."""
    width = max(len(row["arm"]) for row in rows)
    head = f"{'arm':<{width}}  {'pass@1':^20}  {'sampler':^20}  {'against the first':^23}  collapsed  k3 gap   tokens"
    lines = [
        f"{row['arm']:<{width}}  {_interval(row['pass@1'])}  {_interval(row['sampler pass@1'])}  "
        f"{_interval(row['difference'], '+')}  {row['collapsed']:>4} of {row['runs']:<2}  {_plain(row.get('gap/k3_nats')):<7}  "
        f"{_plain(row['tokens'], ',.0f')}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _interval(value: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = value
    if not math.isfinite(mean):
        return f"{'-':^20}"
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _plain(value: tuple[float, float, float] | None, form: str = ".2g") -> str:
    return "-" if value is None or not math.isfinite(value[0]) else f"{value[0]:{form}}"
