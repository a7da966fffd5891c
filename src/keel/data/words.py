"""What a check found, in sentences."""

from __future__ import annotations

from collections import Counter

from keel.data.check import KINDS, Findings, Solved

SHOWN = 5


def told(found: Findings, out: str = "") -> str:
    """Everything, for a terminal."""
    lines = [_head(found), "", *_faults(found)]
    lines += ["", *_solved(found.solved), *_suspects(found)] if found.solved else _unsampled(found)
    return "\n".join([*lines, "", *_kept(found, out)])


def _head(found: Findings) -> str:
    splits = Counter(item.split for item in found.items.items)
    rows = len(found.items.items) + len(found.items.unreadable)
    against = "".join(f"; against {name} ({count:,} rows)" for name, count in found.against.items())
    shapes, largest = found.templates
    lines = [f"{found.items.name}: {rows:,} rows, {splits['train']:,} to train on and {splits['test']:,} held out{against}."]
    if largest > 1:
        lines.append(
            f"Apart from its numbers the most frequent text stands there {largest:,} times; so counted, {shapes:,} are different."
        )
    return "\n".join(lines)


def _faults(found: Findings) -> list[str]:
    if not found.counts:
        return ["No fault: no copies, no leaks, and every gold answer scores 1."]
    lines = []
    for kind, count in found.counts.items():
        first = [fault for fault in found.faults if fault.kind == kind][:SHOWN]
        lines.append(f"{count:>6,} {kind}: {KINDS[kind][0]}{'' if kind in found.drop else ' (kept)'}")
        if kind not in ("suspect", "nobody", "everybody"):
            lines += [f"         {fault.id}{f' ~ {fault.other}' if fault.other else ''}: {fault.why}" for fault in first]
    return lines


def _solved(solved: Solved | None) -> list[str]:
    if solved is None:
        return []
    tiers = ", ".join(f"{count:,} {name}" for name, count in solved.tiers.items())
    live = ", ".join(f"{100 * share:.0f} % with G = {size}" for size, share in solved.live.items() if share is not None)
    dead = solved.nobody + solved.everybody
    lines = [
        f"{solved.items:,} items have samples, {solved.samples:.1f} each: pass rate {solved.pass_rate:.3f}; {tiers}.",
        f"{solved.nobody:,} items were solved by no sample and {solved.everybody:,} by every one: {100 * dead / solved.items:.0f}"
        " % that taught nothing in these samples.",
    ]
    if live:
        lines.append(f"Groups with right and wrong answers, which alone give a gradient: {live}.")
    if solved.truncated:
        lines.append(f"{solved.truncated:,} samples reached the length cap and count as wrong: a budget can look like difficulty.")
    if solved.unscorable:
        lines.append(f"{solved.unscorable:,} samples were unscorable and count in nothing.")
    return lines


def _suspects(found: Findings) -> list[str]:
    model = found.suspicion
    if not found.suspects or model is None:
        return ["No gold answer is contradicted by a stable majority of its samples."]
    strong = sum(suspect.probability >= 0.5 for suspect in found.suspects)
    lines = [
        f"{len(found.suspects):,} gold answers are contradicted by most of their samples, {strong:,} of them more likely wrong "
        f"than right; of all gold answers about {100 * model.wrong:.1f} % seem wrong. Look at these first (a model can err "
        "the same way every time, so look):",
    ]
    for s in found.suspects[: 2 * SHOWN]:
        lines.append(
            f"  {s.probability:.2f}  {s.id}: gold {s.gold!r}, but {s.votes} of {s.tries} say {s.majority!r} ({s.for_gold} gold)"
        )
    return lines


def _unsampled(found: Findings) -> list[str]:
    if found.samples is not None:
        return ["", "No item has four samples: too few to say how hard it is or whether its gold is right."]
    return [
        "",
        "How hard the items are, and whether gold is right, only samples tell: give a run folder or completions by --samples.",
    ]


def _kept(found: Findings, out: str) -> list[str]:
    gone = Counter(fault.kind for fault in found.dropped.values())
    total = len(found.items.items) + len(found.items.unreadable)
    why = ", ".join(f"{count:,} {kind}" for kind, count in gone.items())
    lines = [f"Kept {len(found.kept):,} of {total:,} rows" + (f"; dropped {sum(gone.values()):,}: {why}." if gone else ".")]
    if found.samples is not None and found.samples.unmatched:
        lines.append(f"{found.samples.unmatched:,} samples belong to no row here.")
    return [*lines, f"Written to {out}."] if out else lines
