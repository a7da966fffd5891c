"""The doctor's findings in plain words, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from keel.doctor.card import CONDITIONS, Card
from keel.doctor.finding import Check, Finding
from keel.doctor.foreign import Log
from keel.doctor.triage import Triage, about, page_of

MARK = {"ok": "✓", "broken": "✗", "chosen": "·", "unknown": "?"}
WIDTH = 118
MOST = 3  # sentences of a kind
TOLD = ("batches", "stored scores", "length in the run", "groups in the run", "gap in the run", "course")  # of a healthy run


def told(card: Card) -> str:
    """The whole card."""
    out = [f"keel doctor · {card.source}", ""]
    for name, title in (*CONDITIONS.items(), ("size", "what a run will take")):
        lines = [line for line in card.lines if line.condition == name]
        out.append(title)
        for line in lines:
            bound = f"  [{line.bound}]" if line.bound else ""
            out += _wrapped(f"  {MARK[line.state]} {line.name}: ", f"{line.value}{bound}")
        out.append("")
    return "\n".join([*out, *_verdict(card)])


def told_of_log(log: Log, checks: Sequence[Check]) -> str:
    """What another framework's metrics say, and what they cannot."""
    names = len({name for row in log.rows for name in row}) - 1
    out = [f"keel doctor · {log.source}", "", f"{len(log.rows)} rows of {log.framework}, {names} metrics under keel's names"]
    out += [check_words(check) for check in checks]
    for sentence in log.missing:
        out += _wrapped("not known: ", sentence)
    healthy = not any(check.findings for check in checks)
    return "\n".join([*out, "Nothing in these metrics is impossible." if healthy else "Broken: see above."])


def _verdict(card: Card) -> list[str]:
    diagnosis = card.diagnosis
    out = [f"took {card.seconds:.0f} s"]
    for sentence in diagnosis.unknown:
        out += _wrapped("not known: ", sentence)
    if diagnosis.healthy:
        return [*out, "Nothing that was looked at is broken." if diagnosis.unknown else "Nothing is broken."]
    broken = "; ".join(CONDITIONS[name] for name in card.broken)
    out += [*_wrapped("Broken: ", broken or ", ".join(diagnosis.verdicts)), ""]
    for finding in diagnosis.findings:
        out += finding_words(finding)
    return out


def told_of_run(found: Triage) -> str:
    """Triage, whole."""
    diagnosis, record = found.diagnosis, found.record
    out = [f"keel doctor · {record.source}", *_wrapped("", _run_words(about(record))), ""]
    verdict = "; ".join(f"{part} ({', '.join(dict.fromkeys(f.fault.component for f in fs))})" for part, fs in found.named)
    holds = sum(check.holds for check in diagnosis.checks)
    fine = f"healthy. {holds} looks at it found nothing that is broken."
    silent = f"nothing found in what it left, by {holds} looks. Faults of the step itself leave no trace there."
    out += _wrapped("Verdict: ", verdict or (fine if found.asked else silent))
    for part, findings in found.named:
        out.append("")
        for finding in findings:
            out += finding_words(finding)
            others = [says for says in found.evidence(finding.fault.code) if says != finding.says]
            out += [line for says in others[:MOST] for line in _wrapped("      also: ", says)]
            out += _wrapped("      page: ", f"{page_of(finding)}, or keel doctor {finding.fault.code}")
        out += [line for says in found.against(part)[:MOST] for line in _wrapped("      against: ", says)]
    if diagnosis.healthy:
        out += ["", *(line for c in diagnosis.checks if c.holds and c.name in TOLD for line in _wrapped("  ✓ ", c.says))]
    out += ["", *(line for sentence in diagnosis.unknown for line in _wrapped("not known: ", sentence))]
    out += [f"next: {diagnosis.next_probe}"] if diagnosis.next_probe else []
    return "\n".join([*out, f"took {found.seconds:.0f} s"])


def _run_words(run: Mapping[str, Any]) -> str:
    what = [str(run[name]) for name in ("recipe", "model", "task") if name in run] + (
        [f"seed {run['seed']}"] if "seed" in run else []
    )
    asked = f" of {run['steps_asked']}" if run["steps_asked"] else ""
    scores = [f"held-out pass@1 {run['pass_at_1'][0]:.2f} → {run['pass_at_1'][1]:.2f}"] if run["pass_at_1"] else []
    return " · ".join([*what, f"{run['steps']}{asked} steps", *scores])


def finding_words(finding: Finding) -> list[str]:
    """A finding: what it is, what was seen, why, and what to do."""
    fault = finding.fault
    return [
        *_wrapped(f"{fault.code}  ", f"{fault.name} ({fault.part}, {fault.component})"),
        *_wrapped("      seen: ", finding.says),
        *_wrapped("      why:  ", fault.why),
        *_wrapped("      do:   ", fault.remedy),
    ]


def check_words(check: Check) -> str:
    """One probe's answer."""
    if check.skipped:
        return "\n".join(_wrapped(f"? {check.name}: ", f"not looked at: {check.skipped}"))
    head = _wrapped(f"{MARK['ok' if check.holds else 'broken']} {check.name}: ", f"{check.says} ({check.seconds:.1f} s)")
    return "\n".join([*head, *(line for finding in check.findings for line in finding_words(finding))])


def _wrapped(begin: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin)) or [begin]
