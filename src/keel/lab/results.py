"""What a study came to: each arm's runs as numbers, and each arm against the first, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel.evaluate.estimates import mean_interval
from keel.files import read_jsonl
from keel.lab.runner import Job

SHARE = 0.5  # of its own best, under which a run's accuracy counts as collapsed


@dataclass(frozen=True)
class Outcome:
    """One run.

    Args:
        curve: (generated tokens, held-out pass@1) of the trainer's policy; `sampler` of the engine's, where it is another one.
        numbers: means over the run of some metrics.
        failure: why it did not end; "" otherwise.
    """

    arm: str
    seed: int
    curve: tuple[tuple[float, float], ...]
    sampler: tuple[tuple[float, float], ...]
    numbers: dict[str, float]
    failure: str = ""

    @property
    def last(self) -> float:
        """Held-out pass@1 at the end; NaN where there is none."""
        return self.curve[-1][1] if self.curve and not self.failure else math.nan

    @property
    def last_sampler(self) -> float:
        return self.sampler[-1][1] if self.sampler else self.last

    @property
    def collapsed(self) -> bool:
        """Whether it failed, or ended under half of its own best."""
        return bool(self.failure) or collapsed([y for _, y in self.curve])


def collapsed(accuracy: Sequence[float], share: float = SHARE) -> bool:
    """Whether a curve ends under `share` of its own maximum, or in something that is no number."""
    return not all(map(math.isfinite, accuracy)) or (len(accuracy) > 0 and accuracy[-1] < share * max(accuracy))


MEANS = ("gap/k3_nats", "gap/outside_frac", "policy/clip_frac", "policy/old_kl_nats", "gap/rejected_frac",
         "moe/layers_differ_frac", "moe/tokens_differ_frac", "train/staleness_mean", "tokens/per_s")  # fmt: skip


def outcome(job: Job) -> Outcome:
    """What is on disk of one run."""
    rows = list(read_jsonl(job.out / "metrics.jsonl")) if (job.out / "metrics.jsonl").exists() else []
    tokens, points = 0.0, {"eval/pass@1": [], "eval/sampler/pass@1": []}
    for row in rows:
        tokens = float(row.get("tokens/total", tokens))
        for name, found in points.items():
            if name in row:
                found.append((tokens, float(row[name])))
    means = {name: [row[name] for row in rows if row.get(name) is not None] for name in MEANS}
    numbers = {name: float(np.mean(values)) for name, values in means.items() if values}
    curve, sampler = (tuple(found) for found in points.values())
    return Outcome(job.arm, job.seed, curve, sampler, numbers, job.failure)


def _told(values: Sequence[float]) -> tuple[float, float, float]:
    found = mean_interval(values)
    return found.mean, found.low, found.high


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row an arm: accuracy of trainer and sampler, the difference from the first arm at equal seeds, and how many collapsed."""
    arms = list(dict.fromkeys(o.arm for o in outcomes))
    of = {arm: {o.seed: o for o in outcomes if o.arm == arm} for arm in arms}
    return [_row(arm, of[arm], of[arms[0]]) for arm in arms]


def _row(arm: str, runs: Mapping[int, Outcome], first: Mapping[int, Outcome]) -> dict[str, Any]:
    paired = [runs[seed].last - first[seed].last for seed in sorted(runs.keys() & first.keys())]
    names = {name for run in runs.values() for name in run.numbers}
    return {
        "arm": arm,
        "runs": len(runs),
        "collapsed": sum(run.collapsed for run in runs.values()),
        "failed": sum(bool(run.failure) for run in runs.values()),
        "pass@1": _told([run.last for run in runs.values()]),
        "sampler pass@1": _told([run.last_sampler for run in runs.values()]),
        "difference": _told(paired),
        "best": _told([max((y for _, y in run.curve), default=math.nan) for run in runs.values()]),
        **{name: _told([run.numbers.get(name, math.nan) for run in runs.values()]) for name in sorted(names)},
    }
