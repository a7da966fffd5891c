"""A setting that each arm chooses for itself before the comparison, on seeds of its own: for example its learning rate.

    sweep_seeds = 2
    [sweep]
    train.lr = [5e-5, 1e-4, 2e-4]

The value with the best mean of held-out pass@1 at the end is taken; a run that failed counts as 0. All arms try the same values on
the same seeds, so no arm gets more looks than another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keel.files import read_jsonl
from keel.lab.results import outcome
from keel.lab.runner import Job, folder_name
from keel.lab.study import Arm, Study

SEEDS_FROM = 1_000_000  # a sweep's seeds: none of the comparison's
FOLDER = "_sweep"


@dataclass(frozen=True)
class Swept:
    """What one arm's sweep came to, and what it cost.

    Args:
        means: held-out pass@1 at the end, of each value.
        value: the best one.
        tokens: generated; seconds: of all its runs, one after the other.
    """

    arm: str
    setting: str
    means: dict[float, float]
    value: float
    runs: int
    tokens: float
    seconds: float

    @property
    def words(self) -> str:
        """What was chosen among what."""
        tried = ", ".join(f"{value:g}: {mean:.3f}" for value, mean in self.means.items())
        at_edge = self.value in (min(self.means), max(self.means))
        edge = " (at the edge of what was tried)" if at_edge else ""
        return f"{self.arm}: {self.setting} = {self.value:g}{edge} of {tried}; {self.runs} runs, {self.tokens:,.0f} tokens"


def jobs_of_sweep(study: Study, arms: Sequence[Arm], out: Path, threads: int = 1) -> list[Job]:
    """Every run of the sweep, seed by seed; none where the study has no sweep."""
    return [
        _job(arm, setting, value, SEEDS_FROM + n, out, threads)
        for setting, values in study.sweep.items()
        for n in range(study.sweep_seeds)
        for arm in arms
        for value in values
    ]


def _job(arm: Arm, setting: str, value: float, seed: int, out: Path, threads: int) -> Job:
    place = out / FOLDER / folder_name(arm.name) / f"{value:g}" / str(seed)
    return Job(_name(arm.name, value), seed, place, _with(arm, setting, value).seeded(seed, place, threads).model_dump(mode="json"))


def _name(arm: str, value: float) -> str:
    return f"{arm} @ {value:g}"


def _with(arm: Arm, setting: str, value: float) -> Arm:
    told = {setting: value}
    return replace(arm, changes=arm.changes | told, config=arm.config.replaced(told), difference=arm.difference | told)


def chosen(study: Study, arms: Sequence[Arm], jobs: Sequence[Job]) -> list[Swept]:
    """Each arm's best value, from the runs on disk."""
    return [_chosen(arm.name, setting, values, jobs) for setting, values in study.sweep.items() for arm in arms]


def _chosen(arm: str, setting: str, values: Sequence[float], jobs: Sequence[Job]) -> Swept:
    of = {value: [job for job in jobs if job.arm == _name(arm, value)] for value in values}
    means = {value: sum(map(_accuracy, mine)) / len(mine) for value, mine in of.items()}
    every = [job for mine in of.values() for job in mine]
    ends = [rows[-1] for job in every if (rows := list(read_jsonl(job.out / "metrics.jsonl")))]
    return Swept(
        arm,
        setting,
        means,
        max(means, key=lambda value: means[value]),
        len(every),
        sum(float(row.get("tokens/total") or 0) for row in ends),
        sum(float(row.get("time/total_s") or 0) for row in ends),
    )


def _accuracy(job: Job) -> float:
    last = outcome(job).last
    return last if math.isfinite(last) else 0.0


def swept_arms(arms: Sequence[Arm], found: Sequence[Swept]) -> list[Arm]:
    """The arms, each with the value that it chose."""
    of = {each.arm: each for each in found}
    return [_with(arm, of[arm.name].setting, of[arm.name].value) if arm.name in of else arm for arm in arms]
