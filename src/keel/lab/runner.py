"""Running a study: its plan, its runs, and what is put down of them. A run that ended is never made again; one that was cut off
goes on. Where they run is the business of `local` (processes of this machine) and `on_ray` (tasks of a Ray cluster).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from keel.config import RunConfig
from keel.errors import KeelError
from keel.files import json_of, write_atomically
from keel.lab.job import End, Job, Runs
from keel.lab.local import in_processes
from keel.lab.places import BUILT, FAILED, folder_name
from keel.lab.predictions import Prediction
from keel.lab.study import Arm, Pretrained, Study

LOCAL_WORKERS = 2
MOST_LOST = 2  # times that a run's process may be lost; the last one counts as a failure
SHARED_S = 60.0  # for what one machine wrote to be seen on another: network file systems keep what they know for a while


def jobs_of(study: Study, arms: Sequence[Arm], out: Path, seeds: int, threads: int = 1) -> list[Job]:
    """Every run, seed by seed, so that a study that is stopped early has all arms of its first seeds."""
    places = [out / folder_name(arm.name) for arm in arms]
    arms = [replace(arm, config=_with_built(arm.config, out)) for arm in arms]
    return [
        Job(arm.name, seed, place / str(seed), arm.seeded(seed, place / str(seed), threads).model_dump(mode="json"))
        for seed in range(study.first_seed, study.first_seed + seeds)
        for arm, place in zip(arms, places, strict=True)
    ]


def _with_built(config: RunConfig, out: Path) -> RunConfig:
    """The same with the places of what the study builds."""
    named = {"task": config.task, "model": config.model}
    placed = {name: value.replace(mark, str(out / mark[1:-1])) for mark in BUILT for name, value in named.items() if mark in value}
    return config.replaced(placed) if placed else config


def build(study: Study, out: Path, say: Callable[[str], None]) -> None:
    """Make the study's own data and models in its folder, unless they are there."""
    _build_data(study, out / "data.jsonl")
    for name, wanted in study.models.items():
        _build_model(wanted, out / "models" / name, say)


def _build_model(wanted: Pretrained, place: Path, say: Callable[[str], None]) -> None:
    from keel.models.pretrain import BASE, pretrain

    if place.exists():
        return
    say(f"pretraining the model {place.name!r}, once")
    draft = place.with_name(f".draft-{place.name}")
    shutil.rmtree(draft, ignore_errors=True)
    base = replace(BASE[wanted.size], steps=wanted.steps) if wanted.steps else None
    pretrain(wanted.size, wanted.kind, wanted.seed, draft, base=base)
    draft.rename(place)


def _build_data(study: Study, place: Path) -> None:
    from keel.data.command import run_build

    if not study.build or place.exists():
        return
    settings = {"out": str(place)} | study.build
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what the study came to
            run_build(settings.pop("tasks", ()), **settings)
    except TypeError as fault:
        raise KeelError(
            f"build of study {study.name!r}: {fault}. Expected tasks, size, and settings as `keel data build` has."
        ) from None


def run_jobs(jobs: Sequence[Job], workers: int | None, say: Callable[[str], None], ray: str = "") -> None:
    """Run all that are not done.

    A run that raises is reported beside its folder, and the others go on. One whose process is lost goes on from its checkpoint in
    another; lost as often as `MOST_LOST` says, it counts as failed.

    Args:
        workers: runs at a time; None = two, or with Ray as many as the cluster holds.
        ray: address of a running Ray cluster, or "auto"; "" = processes of this machine.

    Raises:
        KeelError: the cluster cannot be used, or does not see the study's folder.
    """
    open_jobs = [job for job in jobs if not job.done]
    say(f"{len(jobs)} runs, {len(jobs) - len(open_jobs)} of them done")
    if not open_jobs:
        return
    begin, count, ended, lost = time.monotonic(), len(open_jobs), 0, Counter[Path]()
    with _runs(open_jobs, workers, say, ray) as runs:
        while open_jobs:
            with contextlib.closing(runs(open_jobs)) as ends:
                for end in ends:
                    lost[end.job.out] += end.lost
                    state = _settled(end, lost[end.job.out])
                    ended += end.job.done
                    left = (time.monotonic() - begin) / max(ended, 1) * (count - ended)
                    say(f"{ended}/{count}  {end.job.arm}, seed {end.job.seed}: {state}  ({left / 60:.0f} min left)")
            open_jobs = [job for job in open_jobs if not job.done]


@contextlib.contextmanager
def _runs(jobs: Sequence[Job], workers: int | None, say: Callable[[str], None], ray: str) -> Iterator[Runs]:
    """What works on jobs, for as long as the study runs."""
    if not ray:
        yield partial(in_processes, workers=workers or LOCAL_WORKERS)
        return
    from keel.lab.on_ray import cluster

    with cluster(ray, jobs, workers, say) as runs:
        yield runs


def _settled(end: End, lost: int) -> str:
    """Put down what became of a run; the same in a few words."""
    job = end.job
    if end.lost and (job.done or lost < MOST_LOST):
        return "done" if job.done else "cut off; it goes on"
    text = f"lost {lost} times: {end.failure}" if end.lost else end.failure
    if not text and not _shows(job):
        text = f"it ended, and left no summary.json in {job.out}. Was something else written to that folder?"
    if text:
        _record(job, text)
    return text.strip().split("\n")[-1] or "done"


def _shows(job: Job) -> bool:
    """Whether a run's end can be seen; from another machine it may take a moment to get here."""
    until = time.monotonic() + SHARED_S
    while not job.done and time.monotonic() < until:
        time.sleep(0.2)
    return job.done


def _record(job: Job, failure: str) -> None:
    job.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.out.with_name(f"{job.out.name}.{FAILED}"), failure)


def write_plan(study: Study, arms: Sequence[Arm], jobs: Sequence[Job], out: Path) -> tuple[Prediction, ...]:
    """Put the plan of a study into its folder, or see that it is the one that is there.

    More seeds and further predictions are welcome. Which predictions stood there before the first run is kept in the plan.

    Returns:
        The predictions that were written before the first run.

    Raises:
        KeelError: the folder holds another plan.
    """
    place = out / "study.json"
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
    if before is not None and _fixed(Study(**before["study"])) != _fixed(study):
        raise KeelError(f"{out} holds runs of another plan of {study.name!r}. Expected a new folder: name one by --out.")
    begun = before is not None and any(job.out.exists() or job.failure for job in jobs)
    early = before.get("registered", before["study"].get("predictions", [])) if begun else study.model_dump()["predictions"]
    registered = tuple(Prediction(**each) for each in early)
    plan = {
        "study": study.model_dump(mode="json"),
        "arms": {arm.name: arm.changes for arm in arms},
        "runs": len(jobs),
        "registered": [each.model_dump(mode="json") for each in registered],
    }
    write_atomically(place, json_of(plan))
    return registered


def _fixed(study: Study) -> Study:
    """What must not change once a study has runs."""
    return study.model_copy(update={"seeds": 1, "quick_seeds": 1, "hours": None, "predictions": (), "confirm": False})
