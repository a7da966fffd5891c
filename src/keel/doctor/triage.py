"""Triage: what is wrong with a run that has been, from what it left and from the living system that its settings put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keel.doctor.card import check_json, finding_json
from keel.doctor.finding import Check, Diagnosis, Finding, Part
from keel.doctor.probes import PROBES, ask
from keel.doctor.record import Record, read
from keel.doctor.signs import SIGNS, look
from keel.doctor.subject import Subject
from keel.doctor.verdict import ASKED_AGAIN, LOOKS_AT, weigh
from keel.errors import KeelError

PARTS_OF: Mapping[str, Part] = LOOKS_AT | {name: part for name, (part, _) in SIGNS.items()}
NEXT = {  # the probe that tells more, by the beginning of a finding's code
    "K106": "rows", "K107": "rows", "K108": "rows", "K122": "updates", "K125": "advantages", "K128": "advantages",
    "K131": "non-finite gradient", "K145": "repeat", "K151": "echo", "K153": "census", "K174": "metrics", "K215": "unique",
    "K216": "gap", "K217": "sync", "K36": "copies", "K4": "threads", "K56": "difficulty", "K620": "budget", "K670": "gap",
}  # fmt: skip
SYSTEM = "living system"


@dataclass(frozen=True)
class Triage:
    """A run, what was found, and how long it took to look."""

    record: Record
    diagnosis: Diagnosis
    seconds: float

    @property
    def asked(self) -> bool:
        """Whether the living system was: faults of the step itself leave no trace in a folder."""
        return any(check.name in PROBES for check in self.diagnosis.checks)

    @property
    def named(self) -> list[tuple[Part, list[Finding]]]:
        """Each verdict with its findings, one for each fault, the surest first."""
        by_code = {f.fault.code: f for f in reversed(self.diagnosis.findings)}
        return [
            (part, [f for f in self.diagnosis.findings if f.fault.part == part and by_code[f.fault.code] is f])
            for part in self.diagnosis.verdicts
        ]

    def evidence(self, code: str) -> list[str]:
        """What speaks for one fault, in sentences; also what a weaker look at the same saw and found too little."""
        weaker = [name for name, begin in ASKED_AGAIN if code.startswith(begin)]
        found = [f.says for c in self.diagnosis.checks for f in c.findings if f.fault.code == code]
        return list(dict.fromkeys([*found, *(c.says for c in self.diagnosis.checks if c.holds and c.name in weaker)]))

    def against(self, part: Part) -> list[str]:
        """What speaks against a verdict: what holds of that part, in sentences."""
        told = {says for f in self.diagnosis.findings if f.fault.part == part for says in self.evidence(f.fault.code)}
        return [says for says in self.diagnosis.against.get(part, ()) if says not in told]

    def as_json(self) -> dict[str, Any]:
        """For machines; keys stay."""
        diagnosis = self.diagnosis
        return {
            "source": self.record.source,
            "run": about(self.record),
            "healthy": diagnosis.healthy,
            "asked": self.asked,
            "verdicts": list(diagnosis.verdicts),
            "components": list(dict.fromkeys(f.fault.component for f in diagnosis.findings)),
            "named": [
                {
                    "part": part,
                    "faults": [finding_json(f) | {"page": page_of(f), "for": self.evidence(f.fault.code)} for f in found],
                    "against": self.against(part),
                }
                for part, found in self.named
            ],
            "checks": [check_json(c) for c in diagnosis.checks],
            "unknown": list(diagnosis.unknown),
            "next": diagnosis.next_probe,
            "seconds": round(self.seconds, 1),
        }


def triage(
    source: str, *, step: int | None = None, folder_only: bool = False, see: Callable[[Check], None] = lambda check: None
) -> Triage:
    """Read a run folder, ask the living system of its settings, and weigh both.

    Args:
        step: ask it with the weights of this checkpoint; as the run began unless given, since they answer whatever became of it.
        folder_only: ask it nothing.
        see: is told each check of the living system as it is made.

    Raises:
        KeelError: the folder holds nothing of a run.
    """
    record = read(source)
    return examined(record, [Check(SYSTEM, "", skipped="it was not asked")] if folder_only else _living(record, step, see))


def examined(record: Record, living: tuple[Check, ...] | list[Check] = ()) -> Triage:
    """The record's own signs, weighed with what the living system answered."""
    begun = time.perf_counter()
    checks = [*look(record), *living]
    told = weigh(checks, PARTS_OF)
    asked = any(check.name in PROBES for check in living)
    unknown = (*record.unread, *told.unknown)
    diagnosis = Diagnosis(told.verdicts, told.findings, told.checks, told.against, unknown, _next(record, told, asked))
    return Triage(record, diagnosis, sum(c.seconds for c in living) + time.perf_counter() - begun)


def _living(record: Record, step: int | None, see: Callable[[Check], None]) -> list[Check]:
    if record.config is None:
        return [Check(SYSTEM, "", skipped="its settings cannot be read, so nothing could be asked of it")]
    try:
        subject = Subject.of(record.config) if step is None else Subject.of_run(record.source, step)
    except (KeelError, ImportError, OSError) as refused:
        return [Check(SYSTEM, "", skipped=f"it could not be put together: {refused}")]
    try:
        return ask(subject, tuple(PROBES), see)
    finally:
        subject.close()


def _next(record: Record, told: Diagnosis, asked: bool) -> str:
    """The cheapest thing that would tell more; "" where the living system was asked everything, or cannot be."""
    if asked or record.config is None:
        return ""
    code = told.findings[0].fault.code if told.findings else ""
    probe = next((name for begin, name in NEXT.items() if code and code.startswith(begin)), "")
    return f"keel doctor {record.source}" + (f" --probe {probe!r}" if " " in probe else f" --probe {probe}" if probe else "")


def page_of(finding: Finding) -> str:
    """Where the fault's page lies among the documents."""
    return f"docs/faults/{finding.fault.code}.md"


def about(record: Record) -> dict[str, Any]:
    """What the run was, and how far it came."""
    config = record.config
    scores = [row["eval/pass@1"] for row in record.rows if "eval/pass@1" in row]
    told = {name: getattr(config, name) for name in ("recipe", "model", "task", "seed")} if config is not None else {}
    return told | {
        "steps": record.steps,
        "steps_asked": config.steps if config is not None else None,
        "completions": len(record.rollouts),
        "pass_at_1": [scores[0], scores[-1]] if scores else [],
    }
