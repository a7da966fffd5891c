"""What a study came to: each arm's runs as numbers, each arm against the first, seed by seed, and what predictions came to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from keel.evaluate.estimates import mean_interval
from keel.files import read_jsonl
from keel.lab.differences import check_origins
from keel.lab.measures import Series, collapsed_at, series, value_at
from keel.lab.predictions import VALIDATION, At, Prediction
from keel.lab.runner import Job
from keel.lab.statistics import bootstrap_interval, iqm, rank_correlation, survival
from keel.lab.study import Collapse, Study
from keel.lab.tested import Tested, covered, plan_of
from keel.lab.verdicts import Pairs, Verdict, headline, judge

SAMPLER = "eval/sampler/pass@1"
DIGITS = 5  # significant ones in results.json
MEANS = ("gap/k3_nats", "gap/outside_frac", "policy/clip_frac", "policy/old_kl_nats", "gap/rejected_frac",
         "moe/layers_differ_frac", "moe/tokens_differ_frac", "train/staleness_mean", "tokens/per_s")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run.

    Args:
        series: by name: held-out pass@1 of the trainer's policy, of the engine's where that is another one, and what was asked for.
        numbers: means over the run of some metrics.
        steps: optimizer steps that it made.
        failure: why it did not end; "" otherwise.
        ended: whether it did.
        rule: when it counts as collapsed.
    """

    arm: str
    seed: int
    series: Mapping[str, Series]
    numbers: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    failure: str = ""
    ended: bool = True
    rule: Collapse = field(default_factory=Collapse)

    @property
    def curve(self) -> Series:
        return self.series.get(VALIDATION, ())

    @property
    def sampler(self) -> Series:
        return self.series.get(SAMPLER, ())

    @property
    def whole(self) -> bool:
        """Whether it came to its end."""
        return self.ended and not self.failure

    @property
    def tokens(self) -> float:
        """Generated in all, as far as evaluations show."""
        return max((points[-1].tokens for points in self.series.values() if points), default=math.nan)

    def at(self, name: str, place: At, tokens: float = math.nan) -> float:
        """The number that stands for this run; NaN if it did not end, or did not log it."""
        return value_at(self.series.get(name, ()), name, place, self.curve, tokens) if self.whole else math.nan

    @property
    def last(self) -> float:
        """Held-out pass@1 at the end; NaN where there is none."""
        return self.at(VALIDATION, "end")

    @property
    def last_sampler(self) -> float:
        return self.at(SAMPLER, "end") if self.sampler else self.last

    @property
    def collapsed_step(self) -> int | None:
        """The step at which it collapsed; a run that failed has at its last one. None if it stands."""
        place = collapsed_at([point.value for point in self.curve], self.rule)
        if place is not None:
            return self.curve[place].step
        return self.steps if self.failure else None

    @property
    def collapsed(self) -> bool:
        return self.collapsed_step is not None


def outcome(job: Job, names: Iterable[str] = (), rule: Collapse | None = None) -> Outcome:
    """What is on disk of one run.

    Args:
        names: further metrics whose series are wanted.
    """
    rows = list(read_jsonl(job.out / "metrics.jsonl"))
    means = {name: [row[name] for row in rows if row.get(name) is not None] for name in MEANS}
    return Outcome(
        arm=job.arm,
        seed=job.seed,
        series=series(rows, dict.fromkeys([VALIDATION, SAMPLER, *names])),
        numbers={name: float(np.mean(values)) for name, values in means.items() if values},
        steps=int(rows[-1]["step"]) if rows else 0,
        failure=job.failure,
        ended=job.done,
        rule=rule or Collapse(),
    )


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row an arm: accuracy of trainer and sampler, the difference from the first arm at equal seeds, and how many collapsed."""
    of = _by_arm(outcomes)
    first = next(iter(of.values()), {})
    return [_row(arm, runs, first) for arm, runs in of.items()]


def _by_arm(outcomes: Sequence[Outcome]) -> dict[str, dict[int, Outcome]]:
    arms = dict.fromkeys(run.arm for run in outcomes)
    return {arm: {run.seed: run for run in outcomes if run.arm == arm} for arm in arms}


def _row(arm: str, runs: Mapping[int, Outcome], first: Mapping[int, Outcome]) -> dict[str, Any]:
    paired = [runs[seed].last - first[seed].last for seed in sorted(runs.keys() & first.keys())]
    ends = np.array([run.last for run in runs.values() if math.isfinite(run.last)])
    names = {name for run in runs.values() for name in run.numbers}
    return {
        "arm": arm,
        "runs": len(runs),
        "ended": sum(run.ended for run in runs.values()),
        "collapsed": sum(run.collapsed for run in runs.values()),
        "failed": sum(bool(run.failure) for run in runs.values()),
        "pass@1": _told([run.last for run in runs.values()]),
        "sampler pass@1": _told([run.last_sampler for run in runs.values()]),
        "difference": _told(paired),
        "best": _told([run.at(VALIDATION, "best") for run in runs.values()]),
        "tokens": _told([run.tokens for run in runs.values()]),
        "iqm": (float(iqm(ends)), *bootstrap_interval(ends, 0, iqm)) if len(ends) else (math.nan,) * 3,
        **{name: _told([run.numbers.get(name, math.nan) for run in runs.values()]) for name in sorted(names)},
    }


def _told(values: Sequence[float]) -> tuple[float, float, float]:
    found = mean_interval(values)
    return found.mean, found.low, found.high


def _curves(runs: Mapping[int, Outcome]) -> dict[str, Any]:
    """Every seed's held-out curve over generated tokens, when runs collapsed, and why runs failed."""
    fell = [float(run.collapsed_step) for run in runs.values() if run.collapsed_step is not None]
    return {
        "curves": {str(seed): [[p.step, p.tokens, p.value] for p in run.curve] for seed, run in runs.items()},
        "collapsed_at": {str(seed): run.collapsed_step for seed, run in runs.items() if run.collapsed},
        "survival": asdict(survival(fell, [float(run.steps) for run in runs.values() if not run.collapsed])),
        "failures": {str(seed): _last_line(run.failure) for seed, run in runs.items() if run.failure},
    }


def _last_line(text: str) -> str:
    return text.strip().split("\n")[-1][:300]


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def pairs_of(prediction: Prediction, outcomes: Sequence[Outcome], reservations: Sequence[str] = ()) -> Pairs:
    """What a prediction compares, seed by seed, with a reason for each pair that is not whole."""
    of = _by_arm(outcomes)
    if prediction.scale == "ranks":
        return _ranked(prediction, of, reservations)
    reference = prediction.reference(list(of))
    seeds = sorted(of[prediction.arm])
    found = [_pair(prediction, of[prediction.arm][seed], of[reference].get(seed) if reference else None) for seed in seeds]
    absent = [
        _why(prediction, run)
        for seed, pair in zip(seeds, found, strict=True)
        if not all(map(math.isfinite, pair))
        for run in _members(of, prediction.arm, reference, seed)
        if not math.isfinite(run.at(prediction.logged, "end"))
    ]
    return Pairs(prediction, tuple(seeds), *(tuple(side) for side in zip(*found, strict=True)), tuple(absent), tuple(reservations))


def _ranked(told: Prediction, of: Mapping[str, Mapping[int, Outcome]], reservations: Sequence[str]) -> Pairs:
    """Seed by seed, how alike two families of arms rank, against 0: no relation."""
    families = list(zip(*told.families(of), strict=True))
    seeds = sorted(of[families[0][0]])
    rows = {seed: [[of[arm][seed] for arm in family] for family in families] for seed in seeds}
    values = {seed: np.array([[run.at(told.logged, told.at) for run in family] for family in row]) for seed, row in rows.items()}
    absent = [
        _why(told, run)
        for seed in seeds
        for family, numbers in zip(rows[seed], values[seed], strict=True)
        for run, number in zip(family, numbers, strict=True)
        if not math.isfinite(number)
    ]
    found = tuple(rank_correlation(*values[seed]) for seed in seeds)
    return Pairs(told, tuple(seeds), found, (0.0,) * len(seeds), tuple(absent), tuple(reservations))


def _members(of: Mapping[str, Mapping[int, Outcome]], arm: str, reference: str, seed: int) -> list[Outcome]:
    return [of[name][seed] for name in (arm, reference) if name and seed in of[name]]


def _pair(told: Prediction, run: Outcome, other: Outcome | None) -> tuple[float, float]:
    """The run's number, and that which it is compared with."""
    name = told.logged
    if told.against_value is not None:
        return run.at(name, told.at), told.against_value
    if other is None:
        points = run.series.get(name, ())
        return run.at(name, told.at), 0.0 if told.at == "change" else points[0].value if points else math.nan
    tokens = min(points[-1].tokens if (points := each.series.get(name, ())) else math.nan for each in (run, other))
    return run.at(name, told.at, tokens), other.at(name, told.against_at or told.at, tokens)


def _why(told: Prediction, run: Outcome) -> str:
    """Why a run has no number."""
    state = f"logs no finite {told.metric}"
    if run.failure:
        state = f"failed: {_last_line(run.failure)}"
    elif not run.ended:
        state = "has not ended"
    return f"{run.arm}, seed {run.seed} {state}"


# ── all of it ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Results:
    """A study's rows and verdicts. `notes` say what a reader must know besides; `sweep` is what arms chose, of keel.lab.sweep."""

    rows: list[dict[str, Any]]
    verdicts: list[Verdict]
    curves: list[dict[str, Any]]
    tested: Tested
    notes: tuple[str, ...] = ()
    sweep: tuple[Any, ...] = ()

    @property
    def headline(self) -> list[str]:
        return headline(self.verdicts)

    def record(self, study: Study, seeds: int, quick: bool, command: str = "") -> dict[str, Any]:
        """All that a page, or a ledger of claims, needs: as results.json has it.

        Args:
            command: that makes these results again.
        """
        count = len(self.verdicts)
        return _short({
            "study": study.name,
            "question": study.question,
            "source": study.source,
            "seeds": seeds,
            "quick": quick,
            "command": command,
            "range": self.tested.model_dump(),
            "plan": plan_of(study, quick),
            "headline": self.headline,
            "rule": f"Holm over {count} prediction{'s' * (count != 1)} at .05; {study.confirm_seeds} seeds for more than a hint",
            "collapse": study.collapse.model_dump(),
            "predictions": [asdict(verdict) for verdict in self.verdicts],
            "arms": [row | curves for row, curves in zip(self.rows, self.curves, strict=True)],
            "sweep": [{**asdict(each), "means": {f"{k:g}": v for k, v in each.means.items()}} for each in self.sweep],
            "notes": list(self.notes),
        })  # fmt: skip


def results(study: Study, jobs: Sequence[Job], quick: bool = False, registered: Sequence[Prediction] | None = None) -> Results:
    """What the runs on disk come to, finished or not.

    Args:
        registered: predictions that were written before the first run; None = all of them.
    """
    names = [prediction.logged for prediction in study.predictions]
    outcomes = [outcome(job, names, study.collapse) for job in jobs]
    known = study.predictions if registered is None else registered
    pairs = [
        pairs_of(each, outcomes, ["a quick size"] * quick + ["written after the first run"] * (each not in known))
        for each in study.predictions
    ]
    curves = [_curves(runs) for runs in _by_arm(outcomes).values()]
    rows, notes = table(outcomes), check_origins([job.out for job in jobs])
    return Results(rows, judge(pairs, study.confirm_seeds), curves, covered(jobs), (*unlike_tokens(rows), *notes))


def unlike_tokens(rows: Sequence[Mapping[str, Any]], share: float = 0.1) -> tuple[str, ...]:
    """A sentence where arms of one budget generated unlike numbers of tokens in the end: completions grew longer or shorter."""
    spent = {row["arm"]: row["tokens"][0] for row in rows if math.isfinite(row["tokens"][0])}
    if not spent or max(spent.values()) <= (1 + share) * min(spent.values()):
        return ()
    least, most = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    return (f"Arms generated unlike numbers of tokens: {least} {spent[least]:,.0f} a run, {most} {spent[most]:,.0f}.",)


def compact(record: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of its lists: small, and a change shows where it is."""
    lines = [f" {json.dumps(key)}: {_entries(value)}" for key, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _entries(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(each, ensure_ascii=False, allow_nan=False)}" for each in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _short(value: Any) -> Any:
    """Numbers rounded, and null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list | tuple) else value
