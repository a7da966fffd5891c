"""Running a study: a process for each run, a few at a time. A run that ended is never made again; one that was cut off goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keel.config import RunConfig
from keel.errors import KeelError
from keel.files import json_of, write_atomically
from keel.lab.places import FAILED, folder_name
from keel.lab.predictions import Prediction
from keel.lab.study import Arm, Study

DATA = "data"  # what a study builds, in its folder: data.jsonl and its neighbours


@dataclass(frozen=True)
class Job:
    """One run of a study: an arm under one seed, and its folder."""

    arm: str
    seed: int
    out: Path
    config: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether it ended, well or badly."""
        return (self.out / "summary.json").exists() or self.failure != ""

    @property
    def failure(self) -> str:
        """Why it could not end; "" otherwise."""
        told = self.out.with_name(f"{self.out.name}.{FAILED}")
        return told.read_text(encoding="utf-8") if told.exists() else ""


def jobs_of(study: Study, arms: Sequence[Arm], out: Path, seeds: int, threads: int = 1) -> list[Job]:
    """Every run, seed by seed, so that a study that is stopped early has all arms of its first seeds."""
    places = [out / folder_name(arm.name) for arm in arms]
    arms = [replace(arm, config=_with_data(arm.config, out)) for arm in arms] if study.build else arms
    return [
        Job(arm.name, seed, place / str(seed), arm.seeded(seed, place / str(seed), threads).model_dump(mode="json"))
        for seed in range(seeds)
        for arm, place in zip(arms, places, strict=True)
    ]


def _with_data(config: RunConfig, out: Path) -> RunConfig:
    return config.replaced({"task": config.task.replace("{data}", str(out / DATA))})


def build_data(study: Study, out: Path) -> None:
    """Build the study's own data into its folder, unless they are there."""
    from keel.data.command import run_build

    if not study.build or (out / f"{DATA}.jsonl").exists():
        return
    settings = {"out": str(out / f"{DATA}.jsonl")} | study.build
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what the study came to
            run_build(settings.pop("tasks", ()), **settings)
    except TypeError as fault:
        raise KeelError(
            f"build of study {study.name!r}: {fault}. Expected tasks, size, and settings as `keel data build` has."
        ) from None


def run_jobs(jobs: Sequence[Job], workers: int, say: Callable[[str], None]) -> None:
    """Run all that are not done, `workers` at a time.

    A run that raises is reported beside its folder, and the others go on. A worker that is killed takes its runs with it once;
    they go on from their checkpoints in a new pool. The second time they count as failed.
    """
    open_jobs = [job for job in jobs if not job.done]
    say(f"{len(jobs)} runs, {len(jobs) - len(open_jobs)} of them done")
    begin, ended, killed = time.monotonic(), 0, dict.fromkeys((job.out for job in open_jobs), 0)
    while open_jobs:
        for job, lost in _in_pool(open_jobs, workers):
            if lost:
                killed[job.out] += 1
                if killed[job.out] > 1:
                    _record(job, "its process was killed twice (out of memory?)")
            ended += job.done
            left = (time.monotonic() - begin) / max(ended, 1) * (len(killed) - ended)
            state = "cut off; it goes on" if not job.done else job.failure.strip().split("\n")[-1] or "done"
            say(f"{ended}/{len(killed)}  {job.arm}, seed {job.seed}: {state}  ({left / 60:.0f} min left)")
        open_jobs = [job for job in open_jobs if not job.done]


def _in_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, bool]]:
    """(job, whether it was lost) as they end, until the pool is through or broken."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    waiting: dict[Future, Job] = {}
    todo = iter(jobs)
    try:
        for job, _ in zip(todo, range(workers), strict=False):
            waiting[pool.submit(run_one, job.config)] = job
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                job = waiting.pop(future)
                try:
                    failure = future.result()
                except BrokenProcessPool:
                    yield job, True
                    for other in waiting.values():
                        yield other, True
                    return
                if failure:
                    _record(job, failure)
                following = next(todo, None)
                if following is not None:
                    waiting[pool.submit(run_one, following.config)] = following
                yield job, False
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose study was killed ends too; its run goes on from its checkpoint another time."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def run_one(settings: dict[str, Any]) -> str:
    """Train, or go on training, in this process; "" or what went wrong."""
    from keel import run
    from keel.config import RunConfig

    try:
        config = RunConfig(**settings)
        if (Path(config.out) / "config.toml").exists():
            run.resume(config.out, quiet=True)
        else:
            run.train(config, quiet=True)
    except KeelError as fault:
        return str(fault)
    except Exception:  # one run's fault must not end the others
        return traceback.format_exc()
    return ""


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
    return study.model_copy(update={"seeds": 1, "quick_seeds": 1, "predictions": (), "confirm": False})
