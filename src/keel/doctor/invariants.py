"""What a run's health record says: what cannot be, step by step (`keel.diagnostics.health` finds it while the run trains)."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from keel.diagnostics.health import impossible
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import Subject
from keel.errors import KeelError
from keel.files import read_jsonl
from keel.run_folder import RunFolder

CODES = {"reward/verdicts": "K462", "group/size": "K106", "group/count": "K106"}  # all else: a metric


def health_of(path: str | Path) -> Check:
    """The health record of a run folder; skipped where it has none (a run of an older version, or one that took no step)."""
    place = RunFolder(Path(path)).health
    if not place.is_file():
        return Check("health", "", skipped="the run folder has no health.jsonl")
    try:
        rows = list(read_jsonl(place))
    except (KeelError, OSError, ValueError) as damage:
        return Check("health", "", skipped=f"health.jsonl cannot be read: {damage}")
    found = [(row.get("step"), each) for row in rows for each in row.get("found", [])]
    if not found:
        return Check("health", f"nothing impossible in {len(rows)} steps")
    steps: Counter[str] = Counter(each["metric"] for _, each in found)
    first = {each["metric"]: (step, each) for step, each in reversed(found)}
    findings = tuple(_finding(name, count, len(rows), *first[name]) for name, count in steps.most_common())
    return Check("health", findings[0].says, findings)


def metrics_of_a_step(subject: Subject) -> Check:
    """One update's metrics, as a run would write them: nothing in them that cannot be."""
    told = subject.gradient(subject.batch).metrics
    found = impossible(told)
    if not found:
        return Check("metrics", f"{len(told)} numbers of one step are all possible")
    says = f"{found[0].metric} is {found[0].value:g}, and {found[0].why}"
    return Check("metrics", says, (Finding(fault("K174"), says, found[0].value, evidence={"metrics": [f.metric for f in found]}),))


def _finding(name: str, count: int, steps: int, step: int, first: dict) -> Finding:
    value = math.nan if first["value"] is None else float(first["value"])  # a file of JSON lines has no NaN
    says = f"{name} is {value:g} at step {step}, and {first['why']}; so in {count} of {steps} steps"
    return Finding(fault(CODES.get(name, "K174")), says, value, evidence={"metric": name, "steps": count})
