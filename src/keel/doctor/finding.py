"""What the doctor says: findings with a stable code, and the verdict that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["framework", "engine gap", "data", "reward", "difficulty", "settings"]
PARTS: tuple[Part, ...] = ("framework", "engine gap", "data", "reward", "difficulty", "settings")


@dataclass(frozen=True)
class Fault:
    """A kind of fault, as the catalogue has it: one page of docs/faults each.

    Args:
        code: stable, such as "K110": 1xx framework, 2xx engine gap, 3xx data, 4xx reward, 5xx difficulty, 6xx settings.
        name: in a few words.
        part: what is broken.
        component: which piece of it, such as "weight sync" or "extraction".
        shows: how it shows itself.
        why: what causes it.
        remedy: what to do.
        rests_on: the null distribution, the measured floor or the identity that its alarm rests on.
        sources: public addresses where others met it.
    """

    code: str
    name: str
    part: Part
    component: str
    shows: str
    why: str
    remedy: str
    rests_on: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A fault, met.

    Args:
        fault: which.
        says: what was found, in a sentence with its numbers.
        value, bound: the number, and the one that it should keep within; None where the check has none.
        p: probability of such a value without the fault; 0 for an identity that does not hold.
        evidence: names and numbers behind it, for `--json`.
    """

    fault: Fault
    says: str
    value: float | None = None
    bound: float | None = None
    p: float = 0.0
    evidence: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: of the probe or the line of the card.
        says: what was measured, in a sentence; also where nothing is wrong.
        findings: empty where it holds.
        skipped: why it could not be looked at; "" = it was.
        seconds: that it took.
    """

    name: str
    says: str
    findings: tuple[Finding, ...] = ()
    skipped: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return not self.findings and not self.skipped


@dataclass(frozen=True)
class Diagnosis:
    """What a run, or a configuration, suffers from.

    Args:
        verdicts: parts that are broken, the surest first; empty = healthy.
        findings: behind them, the surest first.
        against: for each part what speaks against it, in sentences.
        checks: everything that was looked at.
        unknown: what could not be known, in sentences.
        next_probe: the cheapest thing that would tell more; "" where it is decided.
    """

    verdicts: tuple[Part, ...]
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    next_probe: str = ""

    @property
    def healthy(self) -> bool:
        return not self.verdicts
