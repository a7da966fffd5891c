"""The data card: where the rows came from, what was thrown away and why, and how hard what is left is, with every number."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from keel.data.build import Built
from keel.data.check import Solved, solved
from keel.data.near import template
from keel.data.select import Candidate, effective_answers
from keel.data.votes import Vote
from keel.evaluate.estimates import interval

SIZES = (4, 8)
SOURCES = ("source", "candidates", "recomputed", "graded", "rejected", "measured", "pass rate", "nobody", "everybody", "selected")


def card(built: Built, model: str, checksum: str, files: Mapping[str, Path], spec: str) -> str:
    """The card as Markdown.

    Args:
        model, checksum: whose pass rates they are, and of which weights.
        files: what each is → where.
        spec: the task under which the data can be trained on.
    """
    plan = built.plan
    lines = [
        f"# {len(built.chosen.candidates):,} rows of {', '.join(plan.specs)}",
        "",
        f"Train on them: `keel train solid --task '{spec}'`. The held-out rows are the tasks' own, not selected by anything.",
        "",
        f"Pass rates are those of `{model}` (weights `{checksum[:12]}`), {plan.samples} completions of each candidate at "
        f"temperature {plan.sampling.temperature:g}, at most {plan.sampling.max_completion_tokens} tokens. They go stale while a "
        "policy trains.",
        "",
        *_table(["", "selected", "not selected for: as many candidates at random"], _compared(built)),
        "Selected rows are flattered by the samples they were selected on; *again* is from fresh samples, and counts.",
        "",
        "## Where they came from",
        "",
        *_table(SOURCES, _sources(built)),
        "Recomputed: gold worked out again from the question alone. Graded: the reward gives gold 1, and nothing to the empty "
        "answer or to another question's." + (" Time was up before all were measured." if built.stopped else ""),
        "",
        "## Why the others were left",
        "",
        *_table(["", "rows"], _left(built)),
        "## How",
        "",
        *_table(["setting", "value"], [[name, str(value)] for name, value in vars(plan).items()]),
        *_table(["file", "rows", "SHA-256"], [_file(name, path) for name, path in files.items()]),
        f"{built.seconds:.0f} s.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _compared(built: Built) -> list[list[str]]:
    pairs = [(built.chosen.candidates, built.again), (built.control, built.control_again)]
    columns = [_numbers(first, again) for first, again in pairs]
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _numbers(first: Sequence[Candidate], again: Sequence[Candidate]) -> dict[str, str]:
    was, now = _of(first), _of(again)
    low, high = interval([c.right for c in again], max(c.tries for c in again)) if _even(again) else (float("nan"),) * 2
    tiers = ", ".join(f"{count} {name}" for name, count in now.tiers.items()) if now else ""
    found = {
        "pass rate when selected": f"{was.pass_rate:.3f}" if was else "",
        "pass rate, again": f"{now.pass_rate:.3f} ({low:.3f}–{high:.3f})" if now else "",
        "tiers, again": tiers,
        "solved by nobody, by everybody, again": f"{now.nobody}, {now.everybody}" if now else "",
    }
    for size in SIZES:
        live = now.live.get(size) if now else None
        found[f"groups of {size} with right and wrong, again"] = "" if live is None else f"{100 * live:.1f} %"
    shapes = len({(c.source, template(c.prompt.text)) for c in first})
    answers = len({c.prompt.answer for c in first})
    return found | {
        "sources, texts apart from numbers": f"{len({c.source for c in first})}, {shapes}",
        "answers, effective number": f"{answers}, {effective_answers(first):.1f}",
    }


def _of(rows: Sequence[Candidate]) -> Solved | None:
    return solved([Vote(c.prompt.id, c.tries, c.right, "", 0, 0) for c in rows], SIZES)


def _even(rows: Sequence[Candidate]) -> bool:
    return len({c.tries for c in rows}) == 1


def _sources(built: Built) -> list[list[str]]:
    selected = Counter(c.source for c in built.chosen.candidates)
    rows = []
    for source in built.pool.sources:
        pool = [c for c in built.pool.candidates if c.source == source.name]
        measured = [c for c in built.measured if c.source == source.name and c.tries]
        verified = Counter(c.verified for c in pool)
        rejected = "; ".join(f"{count} {why}" for why, count in built.pool.rejected[source.name].items()) or "0"
        rate = f"{sum(c.pass_rate for c in measured) / len(measured):.3f}" if measured else ""
        ends = [str(sum(c.right == end * c.tries for c in measured)) for end in (0, 1)]
        counts = [str(len(pool)), str(verified["recomputed"]), str(verified["graded"]), rejected, str(len(measured)), rate, *ends]
        rows.append([f"{source.name}{' (variation)' if source.of else ''}", *counts, str(selected[source.name])])
    return rows


def _left(built: Built) -> list[list[str]]:
    unmeasured = len(built.pool.candidates) - len(built.measured)
    left = dict(built.chosen.left) | ({"time was up": unmeasured} if unmeasured else {})
    return [[why, str(count)] for why, count in sorted(left.items(), key=lambda each: -each[1])]


def _file(name: str, path: Path) -> list[str]:
    content = path.read_bytes()
    return [f"`{path.name}` ({name})", str(content.count(b"\n")), f"`{hashlib.sha256(content).hexdigest()}`"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines), ""]
