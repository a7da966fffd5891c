"""A pool of worker processes that can be killed: every question comes back within its bound, and the pool stays whole."""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.errors import KeelError

SCRIPT = Path(__file__).with_name("worker.py")
BOUND = 5.0  # seconds that one question may take
STARTING = 60.0  # seconds that a process may take to start, before it counts as dead


class Failed(Exception):
    """No verdict: the question took too long, or its worker died."""


class _Process:
    """One worker: a process, and a thread that reads what it says."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"}, start_new_session=True,
        )  # fmt: skip
        self.ready, self.asked = False, 0
        self.said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, name="keel-answer-reader", daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.said.put(line)
        self.said.put(None)

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.said.get(timeout=max(0.0, seconds))
        except queue.Empty as error:
            raise Failed("took too long") from error
        if line is None:
            raise Failed("ended the process that read it")
        return json.loads(line)

    def begin(self) -> None:
        """Wait until the process has started."""
        if not self.ready:
            self._next(STARTING)
            self.ready = True

    def ask(self, answer: str, gold: str, seconds: float) -> dict[str, Any]:
        """Its answer to one question, within so many seconds from when the process is ready."""
        self.begin()
        until = time.monotonic() + seconds
        self.asked += 1
        question = json.dumps({"id": self.asked, "answer": answer, "gold": gold, "bound": seconds})
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Failed("could not be asked: its process is gone") from error
        return self._next(until - time.monotonic())

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Kill it, by its own id, and wait until it is gone."""
        self.process.kill()
        self.process.wait(timeout=10)
        self.reader.join(timeout=10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # what was to be flushed has no reader any more


class Workers:
    """`count` processes that run math-verify and one to spare, started with the first question. Safe to use from any thread.

    A question that is not answered within its bound, or whose process dies, raises Failed; its process is killed and another one
    takes its place. Waiting for one's turn or for a process to start is not part of the bound: a busy machine is no reason to
    call an answer unscorable. The one to spare is there so that the question after a killed one finds a process that has started.

    Args:
        count: processes.
        bound: seconds that one question may take.
    """

    def __init__(self, count: int = 2, bound: float = BOUND):
        if count < 1 or not bound > 0:
            raise KeelError(f"Answer workers got count {count} and bound {bound}. Expected at least one process and some seconds.")
        self.count, self.bound = count, bound
        self.killed, self._owner = 0, os.getpid()
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []

    def start(self) -> None:
        """Start the processes, if they are not; returns before they are ready."""
        with self._lock:
            if self._owner != os.getpid():  # a fork: these processes are the parent's
                self._all, self._free, self._owner = [], queue.SimpleQueue(), os.getpid()
            if not self._all:
                require()
                self._all = [_Process() for _ in range(self.count + 1)]
                for process in self._all:
                    self._free.put(process)
                atexit.register(self.close)

    def warm(self) -> None:
        """Start, and wait until every process is ready."""
        self.start()
        taken = [self._free.get() for _ in range(self.count + 1)]
        try:
            for process in taken:
                process.begin()
        finally:
            for process in taken:
                self._free.put(process)

    def ask(self, answer: str, gold: str) -> Mapping[str, Any]:
        """{"read": …, "same": …} as `worker.decide` says it.

        Raises:
            Failed: no verdict within the bound.
        """
        self.start()
        free = self._free
        process = free.get()
        if not process.alive:  # ended while nobody asked it: no fault of this question
            process = self._replaced(process)
        try:
            said = process.ask(answer, gold, self.bound)
        except Failed:
            process = self._replaced(process)
            raise
        finally:
            free.put(process)
        return said

    def _replaced(self, dead: _Process) -> _Process:
        with self._lock:
            dead.end()
            if dead not in self._all:  # the pool was closed meanwhile
                return dead
            fresh = _Process()
            self._all[self._all.index(dead)] = fresh
            self.killed += 1
            return fresh

    @property
    def pids(self) -> list[int]:
        """Processes that are alive."""
        with self._lock:
            return [process.process.pid for process in self._all if process.alive]

    def close(self) -> None:
        """End all processes. A later question starts new ones."""
        with self._lock:
            for process in self._all:
                process.end()
            self._all = []
            self._free = queue.SimpleQueue()
            atexit.unregister(self.close)


def require() -> None:
    """Raises KeelError where math-verify is not installed."""
    from importlib.util import find_spec

    if find_spec("math_verify") is None:
        raise KeelError(
            "Grading answers of this kind needs math-verify, which is not installed. Expected it for what is no number, root or "
            "set. Install it: pip install 'keel-rl[math]'."
        )
