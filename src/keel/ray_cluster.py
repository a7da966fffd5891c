"""A connection to a Ray cluster that is running already; keel starts none, and leaves it as it was.

Ray's own waits have no bound: what could wait for ever is tried in another process first.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from keel.config import RunConfig
from keel.errors import KeelError

CONNECT_S = 60.0  # for a cluster to answer
LISTEN_S = 5.0  # for its port to open
SAME = ("keel-rl", "torch", "transformers")  # versions that must be the same on all machines
INIT = {"log_to_driver": False, "logging_level": "ERROR"}
TRY = f"import sys, ray; ray.init(sys.argv[1], **{INIT}); ray.shutdown()"


@contextlib.contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected to a running cluster; where this process already is, that connection, which then stays.

    Args:
        address: "auto" (what RAY_ADDRESS says, or the cluster of this machine), host:port or ray://host:port.

    Raises:
        KeelError: Ray is missing, or no cluster answers.
    """
    ray = package()
    if ray.is_initialized():
        yield ray
        return
    _check_answers(address)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what happens; stdout is for results
        ray.init(address, **INIT)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_listens(address: str) -> None:
    """See, within seconds, that something is there to connect to: what can be known before anything is loaded.

    Raises:
        KeelError: Ray is missing, or nothing listens at host:port.
    """
    if package().is_initialized():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_S).close()
    except (OSError, OverflowError) as fault:
        raise KeelError(f"Nothing listens at {address!r} ({fault}). " + _what_to_do()) from None


def package() -> ModuleType:
    """The package itself."""
    try:
        import ray
    except ImportError as missing:
        raise KeelError(
            f"--ray needs the package ray, which cannot be imported ({missing}). Install it: pip install 'keel-rl[ray]'. "
            "Without --ray all processes are of this machine."
        ) from missing
    return ray


def _check_answers(address: str) -> None:
    """See that there is a cluster. Ray's own attempt has no bound and cannot be interrupted, so another process tries it first."""
    if address == "local":
        raise KeelError("keel starts no Ray cluster of its own, and --ray local asks for one. " + _what_to_do())
    check_listens(address)
    try:
        tried = subprocess.run(
            [sys.executable, "-c", TRY, address], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S
        )
    except subprocess.TimeoutExpired:
        raise KeelError(f"No Ray cluster answered at {address!r} within {CONNECT_S:.0f} s. " + _what_to_do()) from None
    if len(found := re.findall(r"Ray: (\S+)\s+Python: (\S+)", tried.stderr)) >= 2:
        there, here = (f"Ray {ray} and Python {python}" for ray, python in found[:2])
        raise KeelError(
            f"The Ray cluster at {address!r} has {there}, and this process has {here}. Expected the same on both: install the "
            "cluster's versions here, or start the cluster anew from this environment."
        )
    if tried.returncode:
        raise KeelError(f"There is no Ray cluster to be used at {address!r}: {_first_fault(tried.stderr)}. " + _what_to_do())


def _first_fault(stderr: str) -> str:
    """The exception that others follow from: the first line of its own in tracebacks, and what it goes on with."""
    found = re.search(r"^[\w.]+(?:Error|Exception|Exit): [^\n]*(?:\n[ \t]+\S[^\n]*)*", stderr, re.MULTILINE)
    return " ".join((found[0] if found else stderr[-400:]).split()).rstrip(".")


def _what_to_do() -> str:
    return (
        "Expected a running cluster: start one with `ray start --head` on one machine and `ray start --address=HOST:6379` on the "
        "others, and name it by --ray HOST:6379, or by --ray auto on a machine of the cluster. Without --ray all processes "
        "are of this machine."
    )


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; afterwards it is as it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def presses_noted() -> Iterator[Callable[[], None]]:
    """While inside, Ctrl-C does what it did, and is noted: what comes while Ray is at work can be swallowed there.

    Gives:
        what raises KeyboardInterrupt if there was one since it was last called.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if callable(before):
            before(number, frame)

    def pressed() -> None:
        if noted:
            noted.clear()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def versions() -> dict[str, str]:
    """Of what must be the same on all machines, here."""
    return {name: _version(name) for name in SAME}


def check_versions(expected: Mapping[str, str]) -> None:
    """See that a process here has what another one of its run has.

    Raises:
        KeelError: it has not.
    """
    found = versions()
    for name, ours in expected.items():
        if found[name] != ours:
            raise KeelError(
                f"it has {name} {found[name]}, and the process that started it has {ours}. Expected the same on both: all "
                "processes of a run have one policy. Install the same packages on all machines, and start the cluster anew."
            )


def worker_needs(config: RunConfig) -> dict[str, int]:
    """What a rollout worker asks of the cluster."""
    return {"num_cpus": config.engine.threads or 1, "num_gpus": int(config.train.device.startswith("cuda"))}


def trainer_needs(config: RunConfig) -> dict[str, int]:
    """What a trainer asks of the cluster."""
    return {"num_cpus": config.train.threads or 1, "num_gpus": int(config.train.device.startswith("cuda"))}


def check_room(ray: ModuleType, config: RunConfig) -> None:
    """See that the cluster can hold all processes of a run, when nobody else is there.

    Raises:
        KeelError: it never can.
    """
    cluster, held = config.cluster, ray.cluster_resources()
    who = f"{cluster.rollout_workers} rollout workers" + (f" and {cluster.train_workers} trainers" if cluster.train_workers else "")
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        need = worker_needs(config)[key] * cluster.rollout_workers + trainer_needs(config)[key] * cluster.train_workers
        if need > held.get(name, 0):
            raise KeelError(
                f"{who} need {need} {name}, and the Ray cluster has {held.get(name, 0):g}. Expected room for all: lower "
                "--rollout-workers, --train-workers, engine.threads or train.threads, or add machines."
            )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def in_a_line(fault: Exception) -> str:
    """Ray's text, without the traceback that a task's own exception brings and the advice that follows other ones."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    return lines[-1] if "Traceback" in str(fault) else lines[0]
