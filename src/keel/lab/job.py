"""One run of a study, and what the process does that works on it. Light: a process can be asked before it loads what trains."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.errors import KeelError
from keel.lab.places import FAILED

LOOK_S = 0.5  # how often a process looks whether a run that another one works on is free


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


@dataclass(frozen=True)
class End:
    """What became of a process's work on a run.

    Args:
        failure: why the run ended badly, or how its process was lost; "" if it ended well.
        lost: whether the process ended before the run did. It can go on from its checkpoint.
    """

    job: Job
    failure: str = ""
    lost: bool = False


Runs = Callable[[Sequence[Job]], Iterator[End]]  # works on jobs, a few at a time, and tells of each as it ends


def run_one(settings: dict[str, Any]) -> str:
    """Train, or go on training, in this process; "" or what went wrong. Work that is given out twice is done once."""
    try:
        from keel import run
        from keel.config import RunConfig

        config = RunConfig(**settings)
        place = Path(config.out)
        with alone(place):
            if (place / "summary.json").exists():
                return ""
            if (place / "config.toml").exists():
                run.resume(place, quiet=True)
            else:
                run.train(config, quiet=True)
    except KeelError as fault:
        return str(fault)
    except Exception:  # one run's fault must not end the others
        return traceback.format_exc()
    return ""


def at_work(out: Path) -> Path:
    """A file that is there while a process works on a run (and after one was killed); it says which."""
    return out.with_name(f".{out.name}.at-work")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside, no other process works on this run; until then this one waits. Ctrl-C ends the waiting.

    A machine that is cut off from its cluster may still train a run that was given to another one. The lock goes with the process
    that holds it, and over a network file system where that has locks; where there are none, nothing is waited for.
    """
    place = at_work(out)
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(place)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{socket.gethostname()} {os.getpid()}\n".encode())
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(handle)


def _locked(place: Path) -> int:
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            time.sleep(LOOK_S)
            continue
        except OSError:  # a file system without locks
            return handle
        if _is_still(place, handle):
            return handle
        os.close(handle)


def _is_still(place: Path, handle: int) -> bool:
    """Whether the file that was locked is the one of this name: who held it before has taken it away."""
    try:
        return os.path.samestat(os.stat(place), os.fstat(handle))
    except FileNotFoundError:
        return False
