"""Runs a program that nobody trusts: in a process of its own, without a network, under limits, and until a set time.

On Linux with user namespaces (`isolation` "full") the program sees the interpreter, the system's libraries and a small /tmp, all
else is not there; it has no network, sees no other process, and takes its own along when it ends. Where the system forbids mounts
("network") it still has no network, and can read what its user can read. Elsewhere ("bare": macOS, old kernels, strict
containers) there are only the limits of `resource` and the wall clock. Every result says which it was.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from keel.errors import KeelError

Isolation = Literal["full", "network", "bare"]
Ended = Literal["exit", "signal", "time", "output", "failed"]
CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
GRACE_S = 1.0  # beyond the wall clock, for ending what is left
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Limits:
    """What one run may take.

    Args:
        wall_s: seconds by the clock. cpu_s: seconds of computing, of each process.
        memory_mb: address space of each process. file_mb: of each file, and where there is a /tmp of its own, of all of them.
        processes: processes and threads at a time (not bounded where `isolation` is "bare", nor for a root that may not change
            its user).
        output_kb: bytes of output and of error output that are read before the program is ended.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 16
    output_kb: int = 256

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise KeelError(f"Limits.{name} is {value}. Expected a number above 0: without a limit a program never has to end.")

    def of_system(self) -> dict[str, int]:
        """By the names of `resource`, bytes where it means bytes."""
        mb = 1 << 20
        sizes = {"AS": self.memory_mb * mb, "FSIZE": self.file_mb * mb, "NOFILE": 128, "CORE": 0}
        return {"CPU": self.cpu_s, "NPROC": self.processes} | sizes


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Args:
        ended: "exit" (by itself, with `status`), "signal" (killed, −`status` is the signal), "time", "output" (too much of it) or
            "failed": the sandbox could not start it, `reason` says why. Only the last is not the program's doing.
        output, errors: what it wrote, as far as it was read.
        isolation: what it was kept from.
    """

    ended: Ended
    status: int | None
    output: bytes
    errors: bytes
    seconds: float
    isolation: Isolation
    reason: str = ""


@dataclass
class Sandbox:
    """Runs Python programs. Safe to use from any thread; each run has its own processes.

    Args:
        limits: of each run.
        packages: whether programs can import what is installed beside keel, and not only the standard library.
        require: the weakest isolation that is good enough; a run on a system that offers less is `failed`.
    """

    limits: Limits = field(default_factory=Limits)
    packages: bool = False
    require: Isolation = "bare"

    def run(self, files: Mapping[str, str], main: str, stdin: bytes = b"", arguments: Sequence[str] = ()) -> Ran:
        """Run one of the files as a Python script.

        Args:
            files: name → text, in a folder that the program can read.
            main: which of them to run.
        """
        isolation = available()
        if _rank(isolation) < _rank(self.require):
            reason = f"this system offers {isolation!r} isolation, and {self.require!r} is required"
            return Ran("failed", None, b"", b"", 0.0, isolation, reason)
        return self._run(files, main, stdin, arguments, isolation)

    def describe(self) -> dict[str, object]:
        """For the manifest: the limits, and what the system lets it keep programs from."""
        return {"isolation": available(), "packages": self.packages} | vars(self.limits)

    def _run(
        self, files: Mapping[str, str], main: str, stdin: bytes, arguments: Sequence[str], isolation: Isolation
    ) -> Ran:  # fmt: skip
        folder, begun = "", time.monotonic()
        try:
            folder = tempfile.mkdtemp(prefix="keel-sandbox-")
            order = self._order(files, main, arguments, isolation)
            Path(folder, "order.json").write_text(json.dumps(order), encoding="utf-8")
            return _Run(folder, stdin, self.limits, isolation).result()
        except OSError as fault:  # no folder, no processes left, no memory: not the program's doing
            return Ran("failed", None, b"", b"", time.monotonic() - begun, isolation, f"{type(fault).__name__}: {fault}")
        finally:
            _remove(folder) if folder else None

    def _order(self, files: Mapping[str, str], main: str, arguments: Sequence[str], isolation: Isolation) -> dict[str, object]:
        limits = self.limits.of_system()
        if isolation == "bare" and os.geteuid() != 0:
            del limits["NPROC"]  # it would count everything that the user runs
        python = sys.executable if self.packages else os.path.realpath(sys.executable)
        words = [python, "-I", "-B", *([] if self.packages else ["-S"]), "{work}/" + main, *arguments]
        return {
            "isolation": isolation,
            "number": (os.getpid() % 2**15) * 2**12 + next(_NUMBERS) % 2**12,
            "files": dict(files),
            "argv": words,
            "environment": _ENVIRONMENT,
            "limits": limits,
            "file_mb": self.limits.file_mb,
            "shown": _shown(self.packages),
        }


_ENVIRONMENT = {  # nothing of ours: no keys, no paths
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "{tmp}", "TMPDIR": "{tmp}", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


def _shown(packages: bool) -> list[str]:
    """Folders that a program has to see to run Python at all."""
    paths = sysconfig.get_paths()
    own = [
        paths["stdlib"],
        paths["platstdlib"],
        sys.base_prefix,
        sys.base_exec_prefix,
        os.path.dirname(os.path.realpath(sys.executable)),
    ]
    venv = [sys.prefix, paths["purelib"], paths["platlib"]] if packages else []
    wanted = [*SYSTEM, *own, *venv]
    outer = [path for path in dict.fromkeys(wanted) if path != "/"]
    return [path for path in outer if not any(path.startswith(other + "/") for other in outer)]


class _Run:
    """One run, from its start to the end of its last process."""

    def __init__(self, folder: str, stdin: bytes, limits: Limits, isolation: Isolation):
        self.stdin, self.limits, self.isolation = memoryview(stdin), limits, isolation
        self.begun = time.monotonic()
        told, status = os.pipe()
        self.told = os.fdopen(told, "rb")
        try:
            self.process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-I", "-S", "-B", str(CHILD), folder, str(status)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                pass_fds=(status,), start_new_session=True, cwd="/", env={},
            )  # fmt: skip
        except BaseException:
            self.told.close()
            raise
        finally:
            os.close(status)
        self.read: dict[str, bytearray] = {"output": bytearray(), "errors": bytearray(), "status": bytearray()}

    def result(self) -> Ran:
        try:
            cut = self._pump()
        finally:
            self._end()
        said = _said(bytes(self.read["status"]))
        output, errors = bytes(self.read["output"]), bytes(self.read["errors"])
        seconds = time.monotonic() - self.begun
        if not said.get("started"):
            slow = "it did not start within the wall clock" if cut else "its supervisor ended"
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or [slow]
            return Ran("failed", None, b"", b"", seconds, self.isolation, str(said.get("failed", last[0])))
        status = said.get("status")
        if cut is None and status is None:
            status = -int(signal.SIGKILL)  # it ended its own supervisor: its own doing
        ended = cut or ("exit" if status is not None and status >= 0 else "signal")
        return Ran(ended, None if cut else status, output, errors, seconds, self.isolation)

    def _pump(self) -> Literal["time", "output"] | None:
        """Write and read until the supervisor's pipe and the program's are closed; or which limit came first."""
        process = self.process
        assert process.stdin and process.stdout and process.stderr
        with selectors.DefaultSelector() as selector:
            for pipe, name in ((process.stdout, "output"), (process.stderr, "errors"), (self.told, "status")):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, name)
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
            while len(selector.get_map()) > ("stdin" in (key.data for key in selector.get_map().values())):
                left = self.begun + self.limits.wall_s - time.monotonic()
                if left <= 0:
                    return "time"
                for key, _ in selector.select(left):
                    if key.data == "stdin":
                        self._write(selector, process.stdin)
                    elif not self._read(selector, key):
                        return "output"
        return None

    def _write(self, selector: selectors.BaseSelector, pipe: IO[bytes]) -> None:
        try:
            self.stdin = self.stdin[os.write(pipe.fileno(), self.stdin[:65536]) :] if self.stdin else self.stdin
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.stdin = memoryview(b"")
        if not self.stdin:
            selector.unregister(pipe)
            pipe.close()

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool:
        """Whether there is still room for more."""
        into = self.read[key.data]
        data = os.read(key.fd, 65536)
        if not data:
            selector.unregister(key.fileobj)
        into += data
        return len(into) <= self.limits.output_kb * 1024

    def _end(self) -> None:
        """End the supervisor, who ends the rest; then the group, in case that was not enough."""
        process = self.process
        for pipe in (process.stdin, process.stdout, process.stderr, self.told):
            if pipe is not None:
                pipe.close()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()


def _said(status: bytes) -> dict[str, object]:
    said: dict[str, object] = {}
    for line in status.decode(errors="replace").splitlines():
        said |= json.loads(line)
    return said


def _remove(folder: str) -> None:
    """Also what a program made unreadable."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


# ---- what the system offers ------------------------------------------------------------------------------------------

_RANKS: tuple[Isolation, ...] = ("bare", "network", "full")
_found: dict[str, Isolation] = {}
_finding = threading.Lock()


def _rank(isolation: Isolation) -> int:
    return _RANKS.index(isolation)


def available() -> Isolation:
    """The strongest isolation in which a program starts here; tried once a process."""
    with _finding:
        if "here" not in _found:
            _found["here"] = next((kind for kind in reversed(_RANKS) if kind == "bare" or _works(kind)), "bare")
        return _found["here"]


def _works(kind: Isolation) -> bool:
    if sys.platform != "linux":
        return False
    ran = Sandbox()._run({"main.py": "print('up')"}, "main.py", b"", (), kind)
    return ran.ended == "exit" and ran.output == b"up\n"
