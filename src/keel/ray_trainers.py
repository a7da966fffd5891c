"""Trainers as tasks of a Ray cluster: `keel train --ray ADDRESS --train-workers M`. This process trains nothing; it starts them,
and where one is lost, all go on from the newest checkpoint, in processes of their own.

They find one another as under torchrun, through a store that this process holds, and are ranks as any others.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.config import RunConfig
from keel.errors import KeelError
from keel.files import last_row
from keel.progress import Display, display
from keel.ray_cluster import check_room, check_versions, connected, in_a_line, signals_kept, trainer_needs, versions
from keel.run import Interrupted, Run
from keel.run_folder import RunFolder, place_of
from keel.stopping import StopRequest, stop_requests
from keel.training import checkpoint

LOSSES = 5  # times that trainers are lost, with no new checkpoint in between, until it is given up
LOOK_S = 0.5  # between looks at what the trainers do
LAST_WORDS_S = 10.0  # for the other ranks to end where one was lost
STOP_S = 120.0  # for trainers to end a step and save it
FORCE_S = 10.0  # for their processes to end when they are made to


class Lost(Exception):
    """A trainer's process ended before its run did."""


def train(config: RunConfig, *, quiet: bool = False) -> Run:
    """A new run, as `keel.train` makes it, by trainers on the cluster.

    Raises:
        KeelError: no cluster answers or has room, a machine does not see the run's folder or has other versions, training cannot go
            on, or trainers are lost again and again.
        Interrupted: Ctrl-C; the run is saved.
    """
    config = config.resolved()
    return _followed(config.replaced({"out": str(place_of(config).absolute())}), quiet)


def resume(path: str | Path, config: RunConfig, *, quiet: bool = False) -> Run:
    """Go on with a run by as many trainers as its settings have."""
    return _followed(config.replaced({"out": str(Path(path).absolute())}), quiet)


def _followed(config: RunConfig, quiet: bool) -> Run:
    folder = RunFolder(Path(config.out))
    show = display(sys.stderr, config.steps, _saved(folder), quiet=quiet)
    try:
        with signals_kept(), connected(config.cluster.ray) as ray, _marked(folder.path) as mark, stop_requests(show.say) as stop:
            _until_done(_Trainers(ray, config, folder, mark, show, stop))
    finally:
        show.close()
    return Run(folder, None, folder.summary)


def _until_done(trainers: _Trainers) -> None:
    saved, losses = _saved(trainers.folder), 0
    while True:
        try:
            return trainers.run()
        except Lost as lost:
            before, saved = saved, _saved(trainers.folder)
            losses = 1 if saved > before else losses + 1
            if losses >= LOSSES:
                raise KeelError(
                    f"Trainers were lost {losses} times after step {saved}, with no new checkpoint in between; the last time: "
                    f"{lost} Expected them to live from one checkpoint to the next: if they were killed for memory, take more of "
                    "them (--train-workers) or a smaller train.prompts_per_step. What was saved is whole: go on with "
                    f"`keel train --resume {trainers.folder.path}`."
                ) from None
            trainers.show.say(f"keel: a trainer was lost, and all go on from step {saved}: {lost}")


def _saved(folder: RunFolder) -> int:
    """The newest checkpoint's step; 0 where there is none."""
    return max(checkpoint.checkpoints(folder.checkpoints), default=0)


@contextmanager
def _marked(path: Path) -> Iterator[str]:
    """A file beside the run's folder, by which a machine knows that it sees the same place."""
    mark = path.parent / f".seen-{uuid.uuid4().hex[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)


class _Trainers:
    """All trainers of a run, from their beginning to their common end."""

    def __init__(self, ray: ModuleType, config: RunConfig, folder: RunFolder, mark: str, show: Display, stop: StopRequest):
        self.ray, self.config, self.folder, self.mark, self.show, self.stop = ray, config, folder, mark, show, stop
        self.size, self.address = config.cluster.train_workers, ray.util.get_node_ip_address()
        check_room(ray, config)

    def run(self) -> None:
        """Until the run is done.

        Raises:
            Lost: a process of them ended.
            KeelError: they failed, or did not begin in time, or show no sign of life.
        """
        from torch.distributed import TCPStore

        store = TCPStore(self.address, 0, is_master=True, wait_for_workers=False)
        tasks = self._begin(store)
        try:
            ended = self._first_end(tasks, store)
        except BaseException:
            self._end(tasks)
            raise
        self._judge(tasks, ended)

    def _begin(self, store: Any) -> list[Any]:
        once = dict(max_retries=0, max_calls=1)  # torch joins no second group in a process
        task = self.ray.remote(**trainer_needs(self.config), **once)(train_rank)
        place = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": self.address, "MASTER_PORT": str(store.port)}
        told = dict(expected=versions(), mark=self.mark, cwd=os.getcwd(), resuming=(self.folder.path / "config.toml").exists())
        settings = self.config.model_dump(mode="json")
        return [task.remote(settings, place | {"RANK": str(rank)}, **told) for rank in range(self.size)]

    def _first_end(self, tasks: list[Any], store: Any) -> list[Any]:
        """Wait until one of them ends, whichever way; show meanwhile what they do."""
        begun = news = time.monotonic()
        shown, cluster = None, self.config.cluster
        while not (ended := self.ray.wait(tasks, timeout=LOOK_S)[0]):
            if self.stop.signal:
                self._stopped(tasks)
            row, here = last_row(self.folder.metrics), store.add("here", 0)
            if row and row != shown:
                shown, news = row, time.monotonic()
                self.show.show(row["step"], row)
            if here < self.size and time.monotonic() - begun > cluster.start_s:
                raise KeelError(self._late(here))
            if time.monotonic() - news > max(cluster.start_s, cluster.silence_s):
                raise KeelError(self._silence())
        return ended

    def _late(self, here: int) -> str:
        free = self.ray.available_resources().get("CPU", 0)
        return (
            f"{here} of {self.size} trainers began within {self.config.cluster.start_s:g} s; {free:g} CPUs of the Ray cluster are "
            "free. Expected all of them by then: wait until others have left it, raise cluster.start_s, or lower --train-workers."
        )

    def _silence(self) -> str:
        return (
            f"The trainers finished no step within {self.config.cluster.silence_s:g} s. Expected one by then; raise "
            f"cluster.silence_s if steps or evaluations take longer. What was saved is whole: go on with "
            f"`keel train --resume {self.folder.path}`."
        )

    def _judge(self, tasks: list[Any], ended: list[Any]) -> None:
        """What the end of the first means for all: where a process was lost, others say that they miss it, and that is no news."""
        well = self._told(ended[0]) == ""
        ready, left = self.ray.wait(tasks, num_returns=len(tasks), timeout=STOP_S if well else LAST_WORDS_S)
        self._end(left)
        failures = [said for task in ready if (said := self._told(task))]
        lost = [said for said in failures if isinstance(said, Lost)]
        if lost or failures:
            raise (lost or [KeelError(f"A trainer failed {failures[0]}")])[0]
        if left:
            raise Lost(f"{len(left)} of {self.size} trainers did not end with the others.")

    def _told(self, task: Any) -> str | Lost:
        """ "" if it ended well; else what it said, or how it was lost."""
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayError as fault:
            return Lost(in_a_line(fault))

    def _stopped(self, tasks: list[Any]) -> None:
        """Someone asked for a stop: they save their step."""
        for task in tasks:
            self.ray.cancel(task)
        end = time.monotonic() + STOP_S
        while tasks and time.monotonic() < end:  # in short waits, so that a second Ctrl-C is heard
            _, tasks = self.ray.wait(tasks, num_returns=len(tasks), timeout=LOOK_S)
        self._end(tasks)
        step = _saved(self.folder)
        raise Interrupted(
            f"Stopped; saved up to step {step} of {self.config.steps}. Go on with: keel train --resume {self.folder.path}"
        )

    def _end(self, tasks: list[Any]) -> None:
        for task in tasks:
            self.ray.cancel(task, force=True)
        if tasks:
            self.ray.wait(tasks, num_returns=len(tasks), timeout=FORCE_S)


def train_rank(
    settings: dict[str, Any], place: Mapping[str, str], *, expected: Mapping[str, str], mark: str, cwd: str, resuming: bool
) -> str:
    """On a machine of the cluster: be one rank of a run, to its end. "" or what went wrong."""
    try:
        if not os.path.exists(mark):
            raise KeelError(
                f"it does not see the run's folder {settings['out']}. Expected a folder that all machines share under the same "
                "path: start the run in one, or see --out."
            )
        check_versions(expected)
        if os.path.isdir(cwd):
            os.chdir(cwd)
            sys.path.insert(0, cwd)  # as the command line has it, for plugins
        os.environ |= {**place, "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # it sees no card but its own
        os.environ["OMP_NUM_THREADS"] = str(settings["train"]["threads"] or 1)
        _say_here(place)
        from keel import run

        if resuming:
            run.resume(settings["out"], steps=settings["steps"], parallel=settings["train"]["parallel"], quiet=True)
        else:
            run.train(RunConfig(**settings), quiet=True)
    except KeelError as fault:
        return f"on {socket.gethostname()}: {fault}"
    except Exception:
        return f"on {socket.gethostname()}: {traceback.format_exc()}"
    return ""


def _say_here(place: Mapping[str, str]) -> None:
    from torch.distributed import TCPStore

    TCPStore(place["MASTER_ADDR"], int(place["MASTER_PORT"]), is_master=False, wait_for_workers=False).add("here", 1)
