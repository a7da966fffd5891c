"""From findings to a verdict: what only follows from another finding is left out, and difficulty is what is left over. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from keel.doctor.finding import PARTS, Check, Diagnosis, Finding, Part

NO_REWARD = ("K4", "K620", "K136", "K143", "K151", "K215", "K36")  # with one of these a base that never scores says nothing
FOLLOWS = {  # a finding: the findings of which it may be no more than a consequence, by the beginnings of their codes
    "K568": NO_REWARD,
    "K569": NO_REWARD,
    "K366": ("K4", "K136", "K143", "K151", "K211", "K212", "K215", "K363", "K620"),
    "K212": ("K151", "K214", "K246"),
    "K463": ("K465", "K466"),
    "K485": ("K462",),
    "K174": ("K116", "K131"),
}


def weigh(checks: Sequence[Check]) -> Diagnosis:
    """One diagnosis of everything that was looked at."""
    every = [finding for check in checks for finding in check.findings]
    found = sorted((f for f in every if not _follows(f, every)), key=_surest_first)
    verdicts = tuple(dict.fromkeys(f.fault.part for f in found))
    unknown = tuple(dict.fromkeys(f"{c.name}: {c.skipped}" for c in checks if c.skipped and not _idle(c)))
    against = {part: tuple(c.says for c in checks if c.holds and LOOKS_AT.get(c.name) == part) for part in PARTS}
    return Diagnosis(verdicts, tuple(found), tuple(checks), {part: says for part, says in against.items() if says}, unknown)


LOOKS_AT: dict[str, Part] = {
    **dict.fromkeys(("gold", "cheats", "junk", "hangs", "threads"), "reward"),
    **dict.fromkeys(("copies", "golds"), "data"),
    **dict.fromkeys(("gap", "sampling", "unique", "sync"), "engine gap"),
    **dict.fromkeys(("budget",), "settings"),
    **dict.fromkeys(("difficulty",), "difficulty"),
    **dict.fromkeys(("end tokens", "rows", "echo", "repeat", "padding", "own logits", "masked", "cuts", "order"), "framework"),
    **dict.fromkeys(("non-finite gradient", "updates", "metrics", "advantages", "direction", "bandit"), "framework"),
    **dict.fromkeys(("reversed", "coins", "reference", "KL gradient", "census", "resume"), "framework"),
}


def _follows(finding: Finding, every: Sequence[Finding]) -> bool:
    causes = FOLLOWS.get(finding.fault.code, ())
    return any(other.fault.code.startswith(causes) for other in every) if causes else False


def _surest_first(finding: Finding) -> tuple[float, int]:
    """Identities before chances; of equals, what stands earlier in the catalogue."""
    return finding.p, PARTS.index(finding.fault.part)


def _idle(check: Check) -> bool:
    """Whether there was nothing to look at, which is no gap in what is known."""
    return check.skipped.startswith("the recipe has no")
