"""The doctor's findings in plain words, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from keel.doctor.card import CONDITIONS, Card
from keel.doctor.finding import Check, Finding
from keel.doctor.foreign import Log

MARK = {"ok": "✓", "broken": "✗", "chosen": "·", "unknown": "?"}
WIDTH = 118


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
        return [*out, "Nothing is broken."]
    broken = "; ".join(CONDITIONS[name] for name in card.broken)
    out += [*_wrapped("Broken: ", broken or ", ".join(diagnosis.verdicts)), ""]
    for finding in diagnosis.findings:
        out += finding_words(finding)
    return out


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
