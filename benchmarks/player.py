"""A system under test, in a process of its own: it plays one step when told, and tells seconds and peak memory.

Two players never run at the same time, and neither's memory counts for the other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Step:
    """One step, as a player tells it.

    Args:
        seconds: wall time, everything included.
        rollout_s: sampling and grading.
        train_s: forward, backward and optimizer.
        tokens: sampled completion tokens.
        peak_mb: highest resident memory during the step, above what stood after imports; None where the system cannot tell.
        device_mb: highest memory of a card's tensors during the step; None without a card.
    """

    seconds: float
    rollout_s: float
    train_s: float
    tokens: int
    peak_mb: float | None = None
    device_mb: float | None = None


def memory_mb(key: str) -> float | None:
    """VmRSS (now) or VmHWM (highest since the last `reset_peak`) of this process; None where there is no /proc."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Let VmHWM start again from the resident memory of now."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def device_mb() -> float | None:
    """Most memory of a card's tensors since the last `reset_peak`, once the card has done what it was asked; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


class Channel:
    """The player's end of the pipe. `baseline()` once, after imports; then `wait()` and `done(...)` for each step."""

    def __init__(self, pipe: Connection):
        self.pipe, self.base, self.started = pipe, None, 0.0

    def baseline(self) -> None:
        self.base = memory_mb("VmRSS")
        reset_peak()

    def above(self, key: str) -> float | None:
        return None if self.base is None else memory_mb(key) - self.base

    def ready(self, **facts: Any) -> None:
        """Loaded, and ready for the first step. Tells the peak of loading and whatever else the parent should know."""
        self.pipe.send(("ready", {"loading_peak_mb": self.above("VmHWM"), **facts}))

    def wait(self) -> None:
        """Block until told to play a step, then start the clock. Ends the process quietly when there is no step to come."""
        if self.pipe.recv() != "go":
            raise SystemExit
        reset_peak()
        self.started = time.perf_counter()

    def done(self, rollout_s: float, train_s: float, tokens: int) -> None:
        on_device = device_mb()
        seconds = time.perf_counter() - self.started
        self.pipe.send(("step", Step(seconds, rollout_s, train_s, tokens, self.above("VmHWM"), on_device)))


def _main(pipe: Connection, play: Callable, arguments: tuple) -> None:
    try:
        play(Channel(pipe), *arguments)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            pipe.send(("error", traceback.format_exc()))
        raise


class Player:
    """The parent's end.

    Args:
        play: `play(channel, *arguments)`, a function of an importable module; runs in a fresh process.
    """

    def __init__(self, play: Callable, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_main, args=(other, play, arguments), daemon=True)
        self.process.start()
        other.close()
        self.facts: dict[str, Any] = self._hear("ready")
        self.steps: list[Step] = []

    def step(self) -> Step:
        """Play one step; the call returns when it is over."""
        self.pipe.send("go")
        self.steps.append(self._hear("step"))
        return self.steps[-1]

    def close(self) -> None:
        """Let the process end by itself, so that it removes what it wrote; end it if it does not."""
        if self.process.is_alive():
            self.pipe.send("stop")
            self.process.join(timeout=10)
        self.process.terminate()
        self.process.join()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hear(self, expected: str) -> Any:
        try:
            kind, content = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"A player ended with exit code {code} before it said {expected!r} (−9: out of memory).") from error
        if kind != expected:
            self.close()
            raise RuntimeError(f"A player failed:\n{content}")
        return content


def use_threads(threads: int) -> None:
    """Threads of every process that starts from here on."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
