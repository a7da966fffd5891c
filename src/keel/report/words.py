"""The sentences of the page: the verdict first. They say what the files say, and nothing is judged anew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from keel.report.data import RunData
from keel.report.study import Prediction, StudyData, triple
from keel.summary import difference, moved, skills_of

SAID = {  # verdicts, in the order in which they are counted, as part of a sentence
    "supported": "supported",
    "refuted": "refuted",
    "points to it": "with a hint for it",
    "points against it": "with a hint against it",
    "too small to tell": "too small to tell",
}


def study_headline(study: StudyData) -> str:
    """One sentence on what the study came to."""
    if not study.results:
        return f"Still running: {study.ended} of {study.planned} runs have ended."
    judged = [each.verdict for each in study.predictions if each.verdict != "not judged yet"]
    if len(judged) == 1:
        return f"{_capital(judged[0])}: {study.predictions[0].says.rstrip('.')}."
    if judged:
        return _decided(study.predictions) or f"Of {len(judged)} predictions: {_counted(judged)}."
    return _differences(study)


def _decided(predictions: Sequence[Prediction]) -> str:
    """What was decided by itself, where that is one or two predictions of several and can be said shortly; else ""."""
    decided = [each for each in predictions if each.verdict in ("supported", "refuted")]
    rest = [each.verdict for each in predictions if each not in decided and each.verdict != "not judged yet"]
    told = " ".join(f"{_capital(each.verdict)}: {each.says.rstrip('.')}." for each in decided)
    if not decided or len(decided) > 2 or len(told) > 150:
        return ""
    if set(rest) == {"too small to tell"}:
        return f"{told} {f'The other {len(rest)} are' if len(rest) > 1 else 'The other is'} too small to tell."
    return f"{told} Of the other {len(rest)}: {_counted(rest)}." if rest else told


def _counted(verdicts: Sequence[str]) -> str:
    counts = Counter(verdicts)
    order = sorted(counts, key=lambda verdict: list(SAID).index(verdict) if verdict in SAID else len(SAID))
    return ", ".join(f"{counts[verdict]} {SAID.get(verdict, verdict)}" for verdict in order)


def _differences(study: StudyData) -> str:
    """Without judged predictions: whose interval of the difference from the first arm leaves 0 out."""
    if not study.rows:
        return "No arm has results yet."
    first, *others = study.rows
    if not others:
        return f"One arm: held-out pass@1 ends at {with_interval(first.get('pass@1'))}."
    found = {row["arm"]: triple(row.get("difference")) for row in others}
    known = {arm: value for arm, value in found.items() if value and math.isfinite(value[1])}
    if not known:
        return "One seed an arm: no difference between arms can be told from luck yet."
    above = [arm for arm, (_, low, _) in known.items() if low > 0]
    below = [arm for arm, (_, _, high) in known.items() if high < 0]
    if not above and not below:
        return f"No arm differs from “{first['arm']}” by more than its seeds do."
    told = [f"{_ends_of(names)} {side} “{first['arm']}”" for names, side in ((above, "above"), (below, "below")) if names]
    told += ["the rest is too small to tell"] if len(above) + len(below) < len(others) else []
    return f"{'; '.join(told)}."


def _ends_of(names: Sequence[str]) -> str:
    return f"{_listed([f'“{name}”' for name in names])} {'end' if len(names) > 1 else 'ends'}"


def run_headline(run: RunData) -> str:
    """One sentence on what the run came to; intervals stand in the notes."""
    before, after = _ends(run, "eval/pass@1")
    if not run.rows:
        return "Nothing has been measured yet."
    if before is None or after is None:
        return f"{run.step} of {run.steps} steps, and no held-out number yet."
    if not run.ended and run.step < run.steps:
        now = f"is {share(after[0])}, from {share(before[0])} at first" if after != before else f"was {share(before[0])} at first"
        return f"Training: step {run.step} of {run.steps}; held-out pass@1 {now}."
    moved = _moved(before, after)
    return f"Held-out pass@1 {moved} from {share(before[0])} to {share(after[0])} in {run.step} steps."


def _moved(before: tuple[float, float, float], after: tuple[float, float, float]) -> str:
    change = difference(before, after) if math.isfinite(before[1] + after[1]) else None
    return {"rose": "rose", "fell": "fell"}.get(moved(change), "did not clearly move:")


def runs_headline(runs: Sequence[RunData]) -> str:
    """One sentence on several runs side by side."""
    ends = [(run.name, _ends(run, "eval/pass@1")[1]) for run in runs]
    told = ", ".join(f"{name} {share(end[0])}" if end else f"{name} –" for name, end in ends)
    return f"Held-out pass@1 at the end: {told}."


def run_notes(run: RunData) -> list[str]:
    """What else must be known of a run, in a few sentences."""
    told = []
    if run.rows:
        tokens = max((row.get("tokens/total") or 0 for row in run.rows), default=0)
        told.append(f"{run.step} steps, {tokens:,.0f} generated tokens, {_duration(float(run.rows[-1].get('time/total_s') or 0))}.")
    told += _intervals(run) + _panel(run)
    skipped = int(run.summary.get("skipped_steps") or 0)
    if skipped:
        told.append(f"{skipped} steps were skipped: their gradient was not finite.")
    cut = [row["length/truncated_frac"] for row in run.rows if row.get("length/truncated_frac") is not None]
    if cut and max(cut) > 0.1:
        told.append(f"Up to {100 * max(cut):.0f} % of a batch's completions were cut off at the length cap.")
    return told


def _intervals(run: RunData) -> list[str]:
    before, after = _ends(run, "eval/pass@1")
    if not before or not after or not math.isfinite(before[1] + after[1]):
        return []
    ends = [f"{share(end[1])} to {share(end[2])}" for end in (before, after)]
    return [f"95 % intervals of pass@1 over held-out prompts: {ends[0]} before, {ends[1]} after."]


def _panel(run: RunData) -> list[str]:
    """Skills of the panel that clearly moved, by the interval of their change."""
    told: dict[str, list[str]] = {"fell": [], "rose": [], "same": []}
    for skill in skills_of(run.rows):
        if skill.moved:
            told[skill.moved].append(skill.name)
    said = [f"{_listed(told[verb])} {verb}" for verb in ("fell", "rose") if told[verb]]
    if told["same"]:
        said.append(f"{_listed(told['same'])} stayed where {'it was' if len(told['same']) == 1 else 'they were'}, within intervals")
    return [f"Other skills: {'; '.join(said)}."] if said else []


def _ends(run: RunData, name: str) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """A held-out number with its interval, before and after."""
    found = [row for row in run.rows if row.get(name) is not None]
    if not found:
        return None, None
    told = [(row[name], row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)) for row in (found[0], found[-1])]
    return told[0], told[1]


def share(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else "–"


def with_interval(value: Any, sign: bool = False) -> str:
    """A number of results.json with its interval."""
    found = triple(value)
    say = signed if sign else share
    return "–" if found is None else say(found[0]) + _bounds(found, say)


def _bounds(found: tuple[float, float, float], say: Any) -> str:
    return f" ({say(found[1])} to {say(found[2])})" if math.isfinite(found[1]) else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
