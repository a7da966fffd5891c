"""Runs as tasks of a Ray cluster that is running already; keel starts none, and leaves it as it was.

All machines must see the study's folder, and the folder that it was started in, under the same paths, and have the same keel
installed. Both are tried on every machine before the first run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.errors import KeelError
from keel.lab.job import End, Job, Runs, at_work, run_one
from keel.ray_cluster import SAME, connected, in_a_line, presses_noted, signals_kept, versions

PROBE_S = 120.0  # for all machines to say whether they see the folder
SHARED_S = 20.0  # for a file of theirs to show here
LOOK_S = 2.0  # between looks at what has ended
QUIET_S = 20.0  # without any run at work, before it is said that all wait; longer each time
STOP_S = 120.0  # for runs to end a step and save it, when the study stops
FORCE_S = 10.0  # for their processes to end when they are made to


@contextlib.contextmanager
def cluster(address: str, jobs: Sequence[Job], workers: int | None, say: Callable[[str], None]) -> Iterator[Runs]:
    """A connection to a running cluster, for as long as the study runs: gives what works on jobs there.

    Args:
        address: "auto" (what RAY_ADDRESS says, or the cluster of this machine), host:port or ray://host:port.
        jobs: all that may be worked on; the folder that holds them must be seen by every machine.
        workers: runs at a time; None = as many as the cluster holds.

    Raises:
        KeelError: Ray is missing, no cluster answers, or a machine does not see the folder or has another keel.
    """
    with contextlib.redirect_stdout(sys.stderr), signals_kept(), connected(address) as ray, presses_noted() as pressed:
        with _seen_by_all(ray, jobs, say) as here:
            yield lambda open_jobs: _Pass(ray, open_jobs, workers, here, say, pressed).ends()


# ── the shared folder ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Here:
    """Where the study was started, and a file in its folder by which a machine knows that it sees the same one."""

    folder: str
    mark: str

    def reached(self) -> str:
        """Go there, on another machine; "" or why that cannot be."""
        try:
            os.chdir(self.folder)
            os.stat(self.mark)
        except OSError as fault:
            return f"{fault.filename}: {fault.strerror}"
        return ""


@contextlib.contextmanager
def _seen_by_all(ray: ModuleType, jobs: Sequence[Job], say: Callable[[str], None]) -> Iterator[_Here]:
    """See that every machine that may get a run reads and writes the study's folder, and has the same versions."""
    place = Path(os.path.commonpath([os.path.abspath(job.out.parent) for job in jobs]))
    place.mkdir(parents=True, exist_ok=True)
    mark = place / f".seen-{uuid.uuid4().hex[:12]}"
    mark.touch()
    try:
        here = _Here(os.getcwd(), str(mark))
        nodes = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"] and _holds(node, jobs[0])}
        found = _asked(ray, nodes, here)
        for node, (trouble, _) in found.items():
            _refuse(trouble or _unseen(mark, node), nodes[node], place)
        _check_versions({nodes[node]: theirs for node, (_, theirs) in found.items()})
        say(f"Ray: {ray.cluster_resources().get('CPU', 0):g} CPUs on {', '.join(nodes.values()) or 'no machine'}")
        yield here
    finally:
        for file in (mark, *place.glob(f"{mark.name}-*")):
            file.unlink(missing_ok=True)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _holds(node: Mapping[str, Any], job: Job) -> bool:
    """Whether a run can come to a machine at all."""
    return node["Resources"].get("CPU", 0) >= needs(job)["num_cpus"]


def _asked(ray: ModuleType, nodes: Mapping[str, str], here: _Here) -> dict[str, tuple[str, dict[str, str]]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ask = ray.remote(_look)
    refs = {
        ask.options(num_cpus=0, max_retries=1, scheduling_strategy=On(node, soft=False)).remote(here, node): node for node in nodes
    }
    ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_S) if refs else ([], [])
    if late:
        names = ", ".join(nodes[refs[ref]] for ref in late)
        raise KeelError(f"No answer from {names} within {PROBE_S:.0f} s. Expected every machine of the Ray cluster to be well.")
    found = {}
    for ref in ready:
        try:
            found[refs[ref]] = ray.get(ref)
        except ray.exceptions.RayError as fault:
            raise KeelError(
                f"Ray machine {nodes[refs[ref]]} could not run a task of keel: {in_a_line(fault)} Expected keel to be installed "
                f"there (version {version('keel-rl')}), in the environment that Ray was started from."
            ) from fault
    return found


def _look(here: _Here, node: str) -> tuple[str, dict[str, str]]:
    """On a machine: what keeps it from working on the study ("" if nothing does), and its versions."""
    trouble = here.reached()
    if not trouble:
        try:
            Path(f"{here.mark}-{node}").touch()
        except OSError as fault:
            trouble = f"{fault.filename}: {fault.strerror}"
    return trouble, versions()


def _unseen(mark: Path, node: str) -> str:
    until = time.monotonic() + SHARED_S
    while not Path(f"{mark}-{node}").exists():
        if time.monotonic() > until:
            return "what it writes there does not show here"
        time.sleep(0.2)
    return ""


def _refuse(trouble: str, node: str, place: Path | str) -> None:
    if trouble:
        raise KeelError(
            f"Ray machine {node} does not see the study's folder {place} ({trouble}). Expected this folder, and the one that the "
            "study is started in, to be shared by all machines under the same paths. Start it in such a folder, or see --out."
        )


def _check_versions(found: Mapping[str, Mapping[str, str]]) -> None:
    """Runs are compared by their seeds, and go on elsewhere: all machines must compute the same."""
    ours = version("keel-rl")
    first = next(iter(found.values()), {})
    for node, theirs in found.items():
        if theirs["keel-rl"] != ours:
            raise KeelError(f"Ray machine {node} has keel {theirs['keel-rl']}, and this is keel {ours}. Expected the same.")
        for name in SAME:
            if theirs[name] != first[name]:
                other = next(iter(found))
                raise KeelError(
                    f"Ray machine {node} has {name} {theirs[name]}, and {other} has {first[name]}. Expected the same on all: arms "
                    "are compared seed by seed, and would differ by their machines too."
                )


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def needs(job: Job) -> dict[str, int]:
    """What a run asks of the cluster: a CPU for each thread, and a GPU if it trains on one."""
    train = job.config["train"]
    return {"num_cpus": train["threads"] or 1, "num_gpus": int(train["device"].startswith("cuda"))}


def _work(settings: dict[str, Any], here: _Here) -> tuple[str, str, str]:
    """On a machine: make a run. What went wrong with it, what is wrong with the machine (both "" as a rule), and which it is."""
    trouble = here.reached()
    if trouble:
        return "", trouble, socket.gethostname()
    os.environ["OMP_NUM_THREADS"] = str(settings["train"]["threads"] or 1)
    if here.folder not in sys.path:
        sys.path.insert(0, here.folder)  # as the command line has it, for plugins
    return run_one(settings), "", socket.gethostname()


@dataclass
class _Pass:
    """One pass over jobs: each is given out once."""

    ray: ModuleType
    jobs: Sequence[Job]
    workers: int | None
    here: _Here
    say: Callable[[str], None]
    pressed: Callable[[], None]
    out: dict[Any, Job] = field(default_factory=dict)

    def ends(self) -> Iterator[End]:
        """Each job as its task ends. Whoever stops listening ends the tasks that are left."""
        todo, patience = deque(self.jobs), _Patience(self.ray, self.say)
        patience.tell(self.jobs[0])
        try:
            while todo or self.out:
                while todo and len(self.out) < (self.workers or len(self.jobs)):
                    self._give(todo.popleft())
                ready, _ = self.ray.wait(list(self.out), num_returns=1, timeout=LOOK_S)
                self.pressed()
                for ref in ready:
                    yield self._end(ref)
                patience.look(list(self.out.values()))
        finally:
            self._stop()

    def _give(self, job: Job) -> None:
        task = self.ray.remote(_work).options(**needs(job), max_retries=0, name=f"{job.arm}, seed {job.seed}")
        self.out[task.remote(job.config, self.here)] = job

    def _end(self, ref: Any) -> End:
        job = self.out.pop(ref)
        try:
            failure, trouble, node = self.ray.get(ref)
        except self.ray.exceptions.RayError as fault:
            return End(job, in_a_line(fault), lost=True)
        _refuse(trouble, node, job.out)
        return End(job, failure)

    def _stop(self) -> None:
        """End this study's tasks: they are asked as by Ctrl-C, save what they have, and are made to end if they do not."""
        left = list(self.out)
        if not left:
            return
        with contextlib.suppress(KeyboardInterrupt):
            self.pressed()  # that one brought us here
        self.say(f"Stopping: runs end their step and save it, for up to {STOP_S:.0f} s. Ctrl-C once more stops them at once.")
        try:
            for ref in left:
                self.ray.cancel(ref)
            end = time.monotonic() + STOP_S
            while left and time.monotonic() < end:
                _, left = self.ray.wait(left, num_returns=len(left), timeout=LOOK_S)
                self.pressed()
        finally:
            for ref in left:
                self.ray.cancel(ref, force=True)
            if left:
                self.ray.wait(left, num_returns=len(left), timeout=FORCE_S)


class _Patience:
    """Says that runs wait where the cluster has no room for one; seldomer with time."""

    def __init__(self, ray: ModuleType, say: Callable[[str], None]):
        self.ray, self.say = ray, say
        self.since, self.quiet = time.monotonic(), QUIET_S

    def look(self, jobs: Sequence[Job]) -> None:
        """Whether any of the jobs that were given out is at work."""
        if not jobs or any(at_work(job.out).exists() for job in jobs):
            self.since, self.quiet = time.monotonic(), QUIET_S
        elif time.monotonic() - self.since >= self.quiet:
            self.quiet *= 2
            self.tell(jobs[0])

    def tell(self, job: Job) -> None:
        """What a run waits for, if the cluster does not have it free."""
        free, held, wanted = self.ray.available_resources(), self.ray.cluster_resources(), needs(job)
        for name, count in (("CPU", wanted["num_cpus"]), ("GPU", wanted["num_gpus"])):
            if free.get(name, 0) < count:
                of = f"{free.get(name, 0):g} of the Ray cluster's {held.get(name, 0):g}"
                self.say(f"Waiting: a run needs {count} {name}, and {of} are free. Ctrl-C stops the waiting.")
