"""Runs as processes of this machine, a few at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from keel.lab.job import End, Job, run_one

KILLED = "its process was killed (out of memory?)"


def in_processes(jobs: Sequence[Job], workers: int) -> Iterator[End]:
    """Work on jobs, `workers` at a time, until all have ended or a process is killed: it takes those beside it with it."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    waiting: dict[Future, Job] = {}
    todo = iter(jobs)
    try:
        for _, job in zip(range(workers), todo, strict=False):  # in this order no job is taken and dropped
            waiting[pool.submit(run_one, job.config)] = job
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                job = waiting.pop(future)
                try:
                    failure = future.result()
                except BrokenProcessPool:
                    yield from (End(other, KILLED, lost=True) for other in (job, *waiting.values()))
                    return
                following = next(todo, None)
                if following is not None:
                    waiting[pool.submit(run_one, following.config)] = following
                yield End(job, failure)
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
