"""From findings to a verdict: what only follows from another finding is left out, and difficulty is what is left over. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from keel.doctor.finding import PARTS, Check, Diagnosis, Finding, Part

NO_REWARD = ("K4", "K620", "K655", "K136", "K143", "K151", "K215", "K36")  # with one of these a base that never scores says nothing
OTHER_LOGP = (
    "K109",
    "K122",
    "K139",
    "K140",
    "K143",
    "K145",
    "K151",
    "K188",
    "K210",
    "K211",
    "K212",
    "K213",
    "K214",
    "K246",
    "K247",
)
FOLLOWS = {  # a finding: the findings of which it may be no more than a consequence, by the beginnings of their codes
    "K568": NO_REWARD,
    "K569": NO_REWARD,
    "K366": ("K4", "K136", "K143", "K151", "K211", "K212", "K215", "K363", "K620"),
    "K370": ("K4", "K136", "K143", "K151", "K211", "K212", "K215", "K36", "K620"),
    "K212": ("K151", "K214", "K246"),
    "K463": ("K465", "K466"),
    "K485": ("K462",),
    "K487": ("K458", "K46", "K482", "K485", "K486", "K489"),
    "K174": ("K116", "K131"),
    "K216": OTHER_LOGP,
    "K217": (*OTHER_LOGP, "K216"),
    "K468": ("K151", "K418", "K462", "K485"),
    "K486": ("K151", "K418", "K462", "K466", "K485"),
    "K152": ("K109", "K188"),
    "K620": ("K136",),
    "K670": ("K1", "K2", "K3", "K4", "K5", "K62", "K65"),
}
ASKED_AGAIN = {  # (check, the beginning of a code): the check that asks the same in another way, and where it holds is believed
    ("length in the run", "K620"): "budget",  # more room was given, and nothing came of it
    ("difficulty", "K56"): "groups in the run",  # the run had live groups
    ("groups in the run", "K56"): "difficulty",  # the base can: what the run met is something else
}


def weigh(checks: Sequence[Check], looks_at: Mapping[str, Part] | None = None) -> Diagnosis:
    """One diagnosis of everything that was looked at.

    Args:
        looks_at: the part of which a check speaks where it holds, by its name; that of the probes unless given.
    """
    looks_at = LOOKS_AT if looks_at is None else looks_at
    holds = {check.name for check in checks if check.holds}
    every = [finding for check in checks for finding in check.findings if not _refuted(check, finding, holds)]
    found = sorted((f for f in every if not _follows(f, every)), key=_surest_first)
    verdicts = tuple(dict.fromkeys(f.fault.part for f in found))
    unknown = tuple(dict.fromkeys(f"{c.name}: {c.skipped}" for c in checks if c.skipped and not _idle(c)))
    against = {part: tuple(c.says for c in checks if c.holds and looks_at.get(c.name) == part) for part in PARTS}
    return Diagnosis(verdicts, tuple(found), tuple(checks), {part: says for part, says in against.items() if says}, unknown)


LOOKS_AT: dict[str, Part] = {
    **dict.fromkeys(("gold", "cheats", "junk", "hangs", "threads", "endings"), "reward"),
    **dict.fromkeys(("copies", "golds"), "data"),
    **dict.fromkeys(("gap", "sampling", "unique", "sync"), "engine gap"),
    **dict.fromkeys(("budget", "choice", "decay", "bonus"), "settings"),
    **dict.fromkeys(("difficulty",), "difficulty"),
    **dict.fromkeys(
        ("end tokens", "rows", "echo", "repeat", "padding", "own logits", "again", "masked", "cuts", "order"), "framework"
    ),
    **dict.fromkeys(("stream", "filling", "backward"), "framework"),
    **dict.fromkeys(("non-finite gradient", "updates", "metrics", "advantages", "formula", "direction", "bandit"), "framework"),
    **dict.fromkeys(("reversed", "coins", "reference", "KL gradient", "census", "schedule", "resume"), "framework"),
}


def _refuted(check: Check, finding: Finding, holds: Collection[str]) -> bool:
    return any(
        check.name == name and finding.fault.code.startswith(code) and again in holds for (name, code), again in ASKED_AGAIN.items()
    )


def _follows(finding: Finding, every: Sequence[Finding]) -> bool:
    causes = FOLLOWS.get(finding.fault.code, ())
    return any(other.fault.code.startswith(causes) for other in every) if causes else False


def _surest_first(finding: Finding) -> tuple[float, int]:
    """Identities before chances; of equals, what stands earlier in the catalogue."""
    return finding.p, PARTS.index(finding.fault.part)


def _idle(check: Check) -> bool:
    """Whether there was nothing to look at, which is no gap in what is known."""
    return check.skipped.startswith("the recipe has no")
