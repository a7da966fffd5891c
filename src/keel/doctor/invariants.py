"""What a run's metrics and its health record say: what cannot be, step by step (`keel.diagnostics.health` has the rules)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from keel.diagnostics.health import Row, impossible
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.record import Record
from keel.doctor.subject import Subject

CODES = {"reward/verdicts": "K486", "group/size": "K106", "group/count": "K106"}  # all else: a metric
Met = tuple[int, str, float, str]  # step, metric, value, why it cannot be


def health(record: Record) -> Check:
    """Every step's numbers, and what the run itself noted of its groups: nothing in them that cannot be."""
    if not record.rows and record.health is None:
        return Check("health", "", skipped="there are no metrics and no health record")
    met = list(dict.fromkeys(((step, name) for step, name, _, _ in _met(record))))
    if not met:
        return Check("health", f"nothing impossible in {len(record.rows)} rows of metrics")
    first: dict[str, Met] = {}
    for each in _met(record):
        first.setdefault(each[1], each)
    often = Counter(name for _, name in met)
    findings = tuple(_finding(record, often[name], first[name]) for name, _ in often.most_common())
    return Check("health", findings[0].says, findings)


def _met(record: Record) -> Iterator[Met]:
    for row in record.rows:
        for each in impossible(row):
            yield int(row["step"]), each.metric, each.value, each.why
    for row in record.health or ():
        for each in row.get("found", []):
            value = math.nan if each["value"] is None else float(each["value"])  # a file of JSON lines has no NaN
            yield int(row.get("step", 0)), each["metric"], value, each["why"]


def metrics_of_a_step(subject: Subject) -> Check:
    """One update's metrics, as a run would write them: nothing in them that cannot be."""
    told = subject.gradient(subject.batch).metrics
    found = impossible(told)
    if not found:
        return Check("metrics", f"{len(told)} numbers of one step are all possible")
    says = f"{found[0].metric} is {found[0].value:g}, and {found[0].why}"
    return Check("metrics", says, (Finding(fault("K174"), says, found[0].value, evidence={"metrics": [f.metric for f in found]}),))


def _finding(record: Record, count: int, first: Met) -> Finding:
    step, name, value, why = first
    says = f"{name} is {value:g} at step {step}, and {why}; so in {count} of {record.steps} steps"
    code = "K131" if name == "train/loss" and _lost(record.trained, step) else CODES.get(name, "K174")
    return Finding(fault(code), says, value, evidence={"metric": name, "steps": count})


def _lost(rows: tuple[Row, ...], step: int) -> bool:
    """Whether the loss was finite before this step and never again from it on: the weights are gone."""
    after = [row["train/loss"] for row in rows if row["step"] > step and "train/loss" in row]
    return bool(after) and not any(math.isfinite(value) for value in after)
