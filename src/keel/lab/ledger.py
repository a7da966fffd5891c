"""The ledger of claims: open questions, studies and certificates with their verdicts, written from what they came to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.audit.whole import Audit
from keel.audit.words import claims_markdown, spoken, table
from keel.errors import KeelError
from keel.lab.kept import Kept, KeptPrediction, picture_of, read_kept
from keel.lab.results import compact
from keel.lab.study import Study, load_study, shipped_studies
from keel.lab.tested import Tested, plan_of, planned
from keel.lab.verdicts import HINT_AGAINST, HINT_FOR, OPEN, REFUTED, SUPPORTED, UNITS, number

QUESTIONS = ("clip-once", "forgetting", "kl-synchronous", "stop-before", "kl-coefficient")  # open in the field; a study each
CERTIFIED = {  # whose certificates speak to a study's question
    "aggregation": ("constant_length_mean", "token_mean", "sequence_mean", "prompt_mean", "balanced_mean"),
    "breaking": ("reinforce", "clip", "truncate_token", "mask_token"),
    "clip-higher": ("clip", "clip_higher"),
    "clip-once": ("clip",),
    "dapo-ladder": ("grpo", "dapo", "overlong_filter", "soft_overlong", "clip_higher", "token_mean", "dynamic_sampling"),
    "dynamic-sampling": ("dynamic_sampling",),
    "forgetting": ("k1_in_reward", "k3_in_loss"),
    "grader-noise": ("noisy_grader",),
    "kl-coefficient": ("k1_in_reward",),
    "kl-grid": ("k1_in_reward", "k2_in_reward", "k3_in_reward", "k1_in_loss", "k2_in_loss", "k3_in_loss"),
    "kl-synchronous": ("k1_in_reward", "k3_in_loss"),
    "minirl": ("minirl", "truncate_token", "experts"),
    "normalisation": ("group_mean", "group_std", "raw_batch_std", "centred_batch_std"),
    "overlong": ("overlong_filter", "soft_overlong"),
    "pass-at-k": ("pass@k", "group_std"),
    "routing": ("experts",),
    "staircase": ("reinforce", "clip", "truncate_token"),
    "stop-before": ("reinforce", "truncate_token"),
    "transfer": ("group_std", "centred_batch_std", "sequence_mean"),
}
ORDER = (SUPPORTED, REFUTED, HINT_FOR, HINT_AGAINST, OPEN)
HINT = {HINT_FOR: "points to it (a hint)", HINT_AGAINST: "points against it (a hint)"}
WAITING = "not judged yet"


@dataclass(frozen=True)
class Entry:
    """One study: its file, its results that are kept, or both; and where their picture is, as a page links to it."""

    name: str
    study: Study | None
    kept: Kept | None
    picture: str = ""

    @property
    def question(self) -> str:
        return (self.kept or self.study).question

    @property
    def source(self) -> str:
        return (self.kept or self.study).source

    @property
    def command(self) -> str:
        return (self.kept.command if self.kept else "") or f"keel study {self.name}"

    @property
    def size(self) -> str:
        """What was, or is to be, tested on what."""
        plan = self.kept.plan if self.kept else plan_of(self.study, quick=False)
        if self.kept:
            return _size(self.kept.range, len(self.kept.arms), self.kept.seeds) + _before(plan)
        return _size(planned(self.study), len(self.study.overlays()), self.study.seeds) + _before(plan)

    @property
    def unjudged(self) -> list[str]:
        """Predictions in the study's file that the results do not know."""
        if self.study is None:
            return []
        known = {_key(each) for each in self.kept.predictions} if self.kept else set()
        return [each.says for each in self.study.predictions if _key(each) not in known] or (
            [self.study.prediction] if self.study.prediction and not self.study.predictions else []
        )


def entries(folder: Path, all_shipped: bool = False) -> dict[str, Entry]:
    """Studies whose results are kept in a folder, and with `all_shipped` those that come with the package, by name. Pictures are
    linked to from a page beside that folder.
    """
    kept, shipped = read_kept(folder), shipped_studies()
    names = sorted({*kept, *(shipped if all_shipped else ())})
    pictures = {name: f"{folder.name}/{place.name}" for name in names if (place := picture_of(name, folder)).exists()}
    return {
        name: Entry(name, load_study(name) if name in shipped else None, kept.get(name), pictures.get(name, "")) for name in names
    }


def ledger(folder: Path) -> str:
    """The ledger of one's own studies, as Markdown.

    Args:
        folder: that `keel study … --keep` writes to.
    """
    found = entries(folder).values()
    return "\n".join(["# What the studies came to", "", _tally(found), "", *_studies(found)]) + "\n"


def claims_page(audit: Audit, folder: Path) -> str:
    """docs/claims.md: the open questions, the shipped studies, and every certificate.

    Raises:
        KeelError: results are not as they are written today, or a question has lost its study.
    """
    found = entries(folder, all_shipped=True)
    if lost := [name for name in (*QUESTIONS, *CERTIFIED) if name not in found]:
        raise KeelError(f"The ledger speaks of {', '.join(lost)}. Expected a shipped study of that name in src/keel/studies.")
    certificates = [f"#{line}" if line.startswith("#") else line for line in claims_markdown(audit).split("\n")]
    parts = [_HEAD, _tally(found.values()), _certified(audit), "", "## The open questions", ""]
    for place, name in enumerate(QUESTIONS, 1):
        parts += [*_answer(place, found[name], audit), ""]
    return "\n".join([*parts, "## The studies", "", *_studies(found.values()), *certificates])


_HEAD = """# Claims, and what became of them

Generated by `make docs`; do not edit. Certificates are recomputed whenever the tests run; what is said of a study is read from its
results in `docs/studies`, which `keel study NAME --keep docs/studies` writes.

A prediction is *supported* or *refuted* where its interval lies inside or outside of what was expected, after Holm's correction
over the study, with the seeds that take it; *too small to tell* says neither that there is an effect nor that there is none. With
fewer seeds, in a quick size, with pairs missing, or written after the first run, it is *a hint* at most. All of it holds for the
range that was tested, which is small.
"""


def _tally(found: Iterable[Entry]) -> str:
    """How much there is, counted."""
    found = list(found)
    told = [each.kept for each in found if each.kept]
    verdicts = [each.verdict for kept in told for each in kept.predictions]
    kinds = [f"{HINT.get(kind, kind)}: {verdicts.count(kind)}" for kind in _kinds(verdicts)]
    return f"Studies with results: {len(told)} of {len(found)}. Predictions judged: {'; '.join([str(len(verdicts)), *kinds])}."


def _certified(audit: Audit) -> str:
    holds = [each.holds for each in (*audit.certificates, *audit.facts)]
    return f"Certificates: {len(holds)}; hold: {sum(holds)}; do not hold: {len(holds) - sum(holds)}."


def _kinds(verdicts: Iterable[str]) -> list[str]:
    given = set(verdicts)
    return [*(kind for kind in ORDER if kind in given), *sorted(given - set(ORDER))]


# ── open questions ────────────────────────────────────────────────────────────────────────────────────────────────────


def _answer(place: int, entry: Entry, audit: Audit) -> list[str]:
    """A question of the field: what enumeration says to it, and what its study."""
    exact = [f"- Exact: `{name}` {_plain(spoken(audit, name))}." for name in CERTIFIED[entry.name]]
    head = f"**Q{place}. {_plain(entry.question)}** ({_plain(entry.source)})"
    return [head, "", *exact, f"- Study [{entry.name}](#{entry.name}), {_studied(entry)}"]


def _studied(entry: Entry) -> str:
    if entry.kept is None:
        return f"not run yet: {_code(entry.command)}."
    of = entry.kept.predictions
    groups = {HINT.get(kind, kind): [_short(each) for each in of if each.verdict == kind] for kind in _kinds(e.verdict for e in of)}
    groups |= {WAITING: [_plain(says) for says in entry.unjudged]} if entry.unjudged else {}
    told = [f"*{kind}* {len(each)} of {len(of) + len(entry.unjudged)}: {'; '.join(each)}" for kind, each in groups.items()]
    of_what = f"{_many(entry.kept.seeds, 'seed')} of {_each(map(_code, entry.kept.range.model))}"
    broken = "".join(f" **{text}**" for text in _broken(entry.kept))
    return f"{of_what}{', the quick size' * entry.kept.quick}: {'. '.join(told)}.{broken}"


def _short(told: KeptPrediction) -> str:
    """What was predicted, with the interval that decides: 90 % for an equality that is not refuted, else 95 %."""
    says = _plain(told.says).rstrip(".")
    if told.mean is None:
        return f"{says} (no pair)"
    level = "90" if told.expect == "equal" and told.verdict not in (REFUTED, HINT_AGAINST) else "95"
    low, high = (told.low90, told.high90) if level == "90" else (told.low, told.high)
    unit = UNITS[told.scale]
    if low is None or high is None:
        return f"{says} ({number(told.mean, '+')}{unit})"
    return f"{says} ({number(told.mean, '+')}{unit}; {level} %: {number(low, '+')} to {number(high, '+')})"


# ── studies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _studies(found: Iterable[Entry]) -> list[str]:
    """A section for each study, those with results first."""
    found = list(found)
    run = [line for each in found if each.kept for line in _section(each, each.kept)]
    waiting = [line for each in found if not each.kept for line in _waiting(each)]
    return [*run, *waiting]


def _section(entry: Entry, kept: Kept) -> list[str]:
    """One study that was run: its range, its predictions, and what did not go as it should."""
    rows = [(_plain(each.says), HINT.get(each.verdict, each.verdict), _found(each)) for each in kept.predictions]
    rows += [(_plain(says), WAITING, "") for says in entry.unjudged]
    broken = [f"**{text}**" for text in _broken(kept)]
    quick = ["**The quick size: hints at most.**"] * kept.quick
    notes = [_plain(text) for text in (f"{kept.rule}.", *kept.notes, *_changed(entry))]
    made = f"Made by {_code(entry.command)} in {_hours(kept.range.hours)}, {_versions(kept.range)}."
    lines = [*_top(entry), f"Tested: {entry.size}.", made, *_below(entry), *quick, *broken]
    seen = [f"![held-out pass@1 of each arm]({entry.picture})", ""] if entry.picture else []
    return [*lines, "", *table(("predicted", "verdict", "found"), rows), "", *seen, *notes, ""]


def _waiting(entry: Entry) -> list[str]:
    """One study that has no results yet: what is expected, and how to find out."""
    predicted = [f"- {WAITING}: {_plain(says)}" for says in entry.unjudged]
    lines = [*_top(entry), f"**Not run yet**: {_code(entry.command)}. To be tested: {entry.size}.", *_below(entry)]
    return [*lines, "", *predicted, ""]


def _top(entry: Entry) -> list[str]:
    source = f"Source: {_plain(entry.source).rstrip('.')}." if entry.source else "Source: none is named."
    return [f"### {_plain(entry.name)}", "", f"{_plain(entry.question)} {source}"]


def _below(entry: Entry) -> list[str]:
    names = CERTIFIED.get(entry.name, ()) if entry.study else ()
    return [f"Certificates (`keel audit`): {', '.join(f'`{name}`' for name in names)}."] if names else []


def _found(told: KeptPrediction) -> str:
    hint = [text for text in told.hint if text not in told.words]
    return _plain(told.words) + (f" Besides: {_plain(', '.join(hint))}." if hint else "")


def _broken(kept: Kept) -> list[str]:
    """Runs that failed, collapsed, or did not come to their end."""
    planned_runs, missing = sum(arm.runs for arm in kept.arms), sum(arm.runs - arm.ended for arm in kept.arms)
    told = [f"{missing} of {_many(planned_runs, 'run')} have not ended: {_arms(kept, lambda a: a.runs - a.ended)}."] * (missing > 0)
    if any(arm.failed for arm in kept.arms):
        why = [f"{_plain(arm.arm)}, seed {seed}: {_plain(text)}" for arm in kept.arms for seed, text in arm.failures.items()]
        many = _many(sum(arm.failed for arm in kept.arms), "run")
        told.append(f"{many} failed: {_arms(kept, lambda a: a.failed)} ({_each(why, '; ', 3)}).")
    fell = sum(arm.collapsed for arm in kept.arms)
    return [*told, *[f"{_many(fell, 'run')} collapsed: {_arms(kept, lambda a: a.collapsed)}."] * (fell > 0)]


def _arms(kept: Kept, count: Any) -> str:
    return ", ".join(f"{_plain(arm.arm)} {count(arm)} of {arm.runs}" for arm in kept.arms if count(arm))


def _changed(entry: Entry) -> list[str]:
    """What of the study's file is no longer as it was for these runs."""
    if entry.study is None or entry.kept is None:
        return []
    then, now = entry.kept.plan, json.loads(compact(plan_of(entry.study, entry.kept.quick)))
    names = [f"{part} {name}" for part in now for name in _differing(then.get(part) or {}, now[part] or {})]
    gone = [each.says for each in entry.kept.predictions if _key(each) not in map(_key, entry.study.predictions)]
    return [f"The study's file has changed since these runs: {', '.join(names)}."] * bool(names) + [
        f"No longer in the study's file: {text.rstrip('.')}." for text in gone
    ]


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name) or (name in then) != (name in now)]


def _key(told: Any) -> tuple[Any, ...]:
    """What makes two predictions the same."""
    against = told.against or (f"{told.against_value:g}" if getattr(told, "against_value", None) is not None else "")
    return (told.says, told.arm, against, told.metric, told.at, told.expect, f"{told.margin:.5g}", told.scale)


# ── ranges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _size(t: Tested, arms: int, seeds: int) -> str:
    parameters = f" ({_each(f'{count:,}' for count in t.parameters)} parameters)" if t.parameters else ""
    panel = f", and {_each(map(_code, t.panel), ', ')}" if t.panel else ""
    return (
        f"{_each(map(_code, t.model))}{parameters} on {_each(map(_code, t.task))}; {_many(arms, 'arm')} × {_many(seeds, 'seed')} × "
        f"{_each(t.steps)} steps of {_each(t.prompts_per_step)} × {_each(t.group_size)} completions of at most "
        f"{_each(t.max_completion_tokens)} tokens, {_each(t.updates_per_batch)} update{'s' * (t.updates_per_batch != (1,))} "
        f"a batch, lr {_each(f'{rate:g}' for rate in t.lr)}; evaluated on {_each(t.items)} held-out completions{panel}"
    )


def _before(plan: Mapping[str, Any]) -> str:
    """What a study makes before it compares: its own data, and each arm's choice among values of a setting."""
    build, models, sweep = (plan.get(name) or {} for name in ("build", "models", "sweep"))
    told = [f"data built with {_settings(build)}"] if build else []
    told += [f"`{{models}}/{name}` pretrained with {_settings(made)}" for name, made in models.items()]
    told += [f"each arm with the best of {_settings(sweep)} on other seeds"] if sweep else []
    return "".join(f"; {each}" for each in told)


def _settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_each(value) if isinstance(value, list) else value}" for name, value in given.items())


def _versions(t: Tested) -> str:
    told = [f"{name} {_each(found)}" for name, found in t.versions.items() if found]
    return ", ".join([*told, _revisions(t.revisions)])


def _revisions(found: Mapping[str, int]) -> str:
    names = list(dict.fromkeys(name.rstrip("+") for name in found))
    told = f"revision {_code(names[0])}" if len(names) == 1 else f"{len(names)} revisions" if names else "no run has begun"
    changed = sum(count for name, count in found.items() if name.endswith("+"))
    return told + (f" ({changed} of {_many(sum(found.values()), 'run')} with changes that are in none)" if changed else "")


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours of one process" if hours >= 1 else f"{60 * hours:.0f} minutes of one process"


def _each(values: Iterable[Any], between: str = " / ", most: int = 5) -> str:
    told = [str(value) for value in values]
    return between.join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(text: str) -> str:
    """Words as they are, in one line: nothing in them is markup."""
    return "".join(f"\\{sign}" if sign in "\\`*<[]" else sign for sign in " ".join(text.split()))


def _code(text: str) -> str:
    return _plain(text) if set(text) & set("`|\\\n") else f"`{text}`"
