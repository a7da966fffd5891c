"""Rollouts on a Ray cluster: workers sample parts of batches while the trainer learns, under the same bound on staleness.

A batch's prompts are cut into as many parts as there are workers; whoever is free takes the oldest part, with the newest weights.
Batches are used in the order in which they were asked for, whole. Draws are keyed by step and prompt, so who samples what changes
nothing. A worker that dies is replaced and its part given out once more; prompts that cost three workers end the run, since they
would cost every other one too, and to leave them out would bend the data without a sign.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from keel.config import RunConfig
from keel.errors import KeelError
from keel.ray_cluster import check_room, connected, in_a_line, signals_kept, versions, worker_needs
from keel.training.buffer import Collected, Filling, PromptStream
from keel.training.ray_worker import Part, RolloutWorker
from keel.training.transfer import as_arrays, dumps, loads
from keel.training.window import Window
from keel.types import Group, Prompt

LOSSES = 3  # workers that die on the same prompts, one after another, until it is given up
FALSE_STARTS = 5  # workers that die before they have begun, one after another, until it is given up
END_S = 5.0  # for the thread that speaks with the workers to end


@dataclass
class Asked:
    """A batch on its way.

    Args:
        versions: of the weights that its parts were sampled with.
        parts: of the current round, in the order of their prompts; None where one is not there yet.
        seconds: of sampling so far.
        made: the batch, once it is full.
        taken: prompts consumed, up to and with this batch.
    """

    step: int
    filling: Filling
    versions: list[int] = field(default_factory=list)
    parts: list[list[Group] | None] = field(default_factory=list)
    seconds: float = 0.0
    made: Collected | None = None
    taken: int = 0


@dataclass
class Piece:
    """Some prompts of a batch, for one worker."""

    batch: Asked
    place: int
    prompts: Sequence[Prompt]
    version: int = -1  # of the weights that it was given out with
    losses: int = 0


@dataclass
class Worker:
    """An actor, what it works on, and its process id once it is ready."""

    actor: Any
    piece: Piece | None = None
    pid: int | None = None


class RayRollouts:
    """Batches from workers of a Ray cluster.

    Args:
        config: resolved; each worker loads its own model, engine and task from it.
        weights: as version `version`; one copy of each version goes to the cluster's memory, and workers fetch it from there.
        stream: the trainer's place in the data, kept at the last batch that was used; what is asked for runs ahead of it.

    Raises:
        KeelError: no cluster answers, it has no room for the workers, or they cannot begin.
    """

    def __init__(self, config: RunConfig, weights: Mapping[str, Tensor], version: int, stream: PromptStream):
        self.config, self.stream = config, stream
        self.window = Window(config, version)
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # what the crew hears: answers, new weights, the end
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()  # "ready", then batches in their order; or why there are none
        self.connection = contextlib.ExitStack()
        with signals_kept():
            self.ray = self.connection.enter_context(connected(config.cluster.ray))
        atexit.register(self.close)
        ahead = PromptStream(stream.prompts, stream.seed, stream.taken)
        self.crew = Crew(self.ray, config, self.window, ahead, self.inbox, self.outbox)
        try:
            self.publish(weights, version)
            self.crew.start()
            self._receive(config.cluster.start_s, self.crew.still_waiting)
        except BaseException:
            self.close()
            raise

    def collect(self, step: int) -> Collected:
        """The oldest batch that was asked for, once it is there.

        Raises:
            KeelError: workers failed, died again and again, or did not answer within `engine.timeout_s`.
        """
        batch: Asked = self._receive(self.config.engine.timeout_s, self._silence)
        self.window.use(step, min(batch.versions))
        self.stream.taken = batch.taken
        return batch.made

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Hand over new weights: whatever is given out from now on is sampled with these."""
        try:
            kept = self.ray.put(as_arrays(weights))
        except self.ray.exceptions.RayError as fault:
            size = sum(tensor.nbytes for tensor in weights.values()) / 1e9
            raise KeelError(
                f"The weights ({size:.2f} GB) could not be handed to the Ray cluster: {in_a_line(fault)} Expected room for two "
                "versions in its object store: start the cluster with a larger --object-store-memory."
            ) from fault
        self.inbox.put(("weights", kept, version))

    def close(self) -> None:
        """End the workers: kindly, then by force; leave the cluster as it was."""
        self.inbox.put(None)
        self.crew.end(20.0 if self.config.engine.name != "local" else 0.5)
        self.connection.close()
        atexit.unregister(self.close)

    def _receive(self, seconds: float, silence: Callable[[float], str]) -> Any:
        try:
            found = self.outbox.get(timeout=seconds)
        except queue.Empty:
            raise KeelError(silence(seconds)) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _silence(self, seconds: float) -> str:
        return (
            f"No batch came from the rollout workers within {seconds:g} s. Expected one by then; raise engine.timeout_s if batches "
            "take longer, or look at what the engines are waiting for. Nothing that was saved is lost: `keel train --resume`."
        )


class Crew:
    """The workers and what they are given, in a thread of its own that alone changes them: it hears one thing at a time."""

    def __init__(self, ray: Any, config: RunConfig, window: Window, stream: PromptStream, inbox: Any, outbox: Any):
        self.ray, self.config, self.window, self.stream, self.inbox, self.outbox = ray, config, window, stream, inbox, outbox
        self.weights, self.version = None, -1
        self.workers: list[Worker] = []
        self.batches: deque[Asked] = deque()  # asked for, not yet handed over
        self.pieces: deque[Piece] = deque()  # to be given out, oldest first
        self.spent: dict[int, Mapping[str, float]] = {}  # by process
        self.lost = self.false_starts = 0
        self.begun = False
        self.thread = threading.Thread(target=self._run, name="keel-crew", daemon=True)

    def start(self) -> None:
        """Begin as many workers as are asked for, and listen.

        Raises:
            KeelError: the cluster can never hold them.
        """
        check_room(self.ray, self.config)
        for _ in range(self.config.cluster.rollout_workers):
            self._hire()
        self.thread.start()

    def end(self, patience: float) -> None:
        """Stop listening and end all workers, after at most `patience` seconds of waiting for engines that have processes."""
        if self.thread.is_alive():
            self.thread.join(END_S)
        if self.workers and self.ray.is_initialized():
            with contextlib.suppress(self.ray.exceptions.RayError):
                closing = [worker.actor.close.remote() for worker in self.workers if worker.pid]
                self.ray.wait(closing, num_returns=len(closing), timeout=patience) if closing else None
            for worker in self.workers:
                self.ray.kill(worker.actor)
        self.workers = []

    def still_waiting(self, seconds: float) -> str:
        """What to say when workers have not begun in time."""
        ready, free = sum(worker.pid is not None for worker in self.workers), self.ray.available_resources().get("CPU", 0)
        return (
            f"{ready} of {len(self.workers)} rollout workers began within {seconds:g} s; {free:g} CPUs of the Ray cluster are "
            "free. Expected all of them by then: wait until others have left it, raise cluster.start_s, or lower --rollout-workers."
        )

    # ── hearing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while (told := self.inbox.get()) is not None:
                self._hear(*told)
                if self.begun:
                    self._ask()
                    self._give()
                    self._hand_over()
        except BaseException as fault:  # the trainer must hear of it, whatever it was
            self.outbox.put(fault)

    def _hear(self, kind: str, *told: Any) -> None:
        if kind == "weights":
            self.weights, self.version = told
            return
        worker, answer, fault = told
        if fault is not None:
            self._replace(worker, fault)
        elif answer[0] == "failed":
            raise KeelError(f"A rollout worker failed {answer[1]}")
        elif answer[0] == "ready":
            worker.pid, self.false_starts = answer[1], 0
            self._tell_when_all_are_ready()
        else:
            self._take(worker, loads(answer[1]))

    def _tell_when_all_are_ready(self) -> None:
        if not self.begun and all(worker.pid for worker in self.workers):
            self.begun = True
            self.outbox.put("ready")

    def _take(self, worker: Worker, part: Part) -> None:
        piece, worker.piece = worker.piece, None
        batch = piece.batch
        batch.parts[piece.place], batch.seconds = part.groups, batch.seconds + part.seconds
        batch.versions.append(piece.version)
        self.spent[worker.pid] = part.spent
        if all(groups is not None for groups in batch.parts):
            batch.made = batch.filling.add([group for groups in batch.parts for group in groups])
            if batch.made is None:
                self._cut(batch)

    def _replace(self, worker: Worker, fault: BaseException) -> None:
        """A worker died: hire another one, and give its prompts out again."""
        self.workers.remove(worker)
        self.lost += 1
        piece, why = worker.piece, in_a_line(fault)
        if worker.pid is None:
            self.false_starts += 1
            if self.false_starts >= FALSE_STARTS:
                raise KeelError(
                    f"{FALSE_STARTS} rollout workers in a row died before they had begun; the last one: {why} Expected keel to be "
                    "installed in the environment that Ray was started from, and memory for one more model on that machine."
                )
        if piece is not None:
            piece.losses += 1
            if piece.losses >= LOSSES:
                raise KeelError(
                    f"{LOSSES} rollout workers died one after another on the same {len(piece.prompts)} prompts, the first of them "
                    f"{piece.prompts[0].id!r}; the last one: {why} Expected another worker to do better than the first: if they "
                    "were killed for memory, lower engine.kv_cache_gb, train.group_size or sampling.max_completion_tokens. Nothing "
                    "that was saved is lost: go on with `keel train --resume`."
                )
            self.pieces.appendleft(piece)
        print(f"keel: a rollout worker died and is replaced: {why}", file=sys.stderr)
        self._hire()

    # ── asking and giving ─────────────────────────────────────────────────────────────────────────────────────────────

    def _hire(self) -> None:
        needs = worker_needs(self.config)
        actor = self.ray.remote(RolloutWorker).options(max_restarts=0, max_task_retries=0, **needs).remote()
        worker = Worker(actor)
        self.workers.append(worker)
        settings = self.config.replaced({"train.device": "cuda"}) if needs["num_gpus"] else self.config
        self._call(worker, actor.begin, settings.model_dump(mode="json"), versions(), os.getcwd())

    def _call(self, worker: Worker, method: Any, *given: Any) -> None:
        def heard(future: Any) -> None:
            fault = future.exception()
            self.inbox.put(("answer", worker, None if fault else future.result(), fault))

        method.remote(*given).future().add_done_callback(heard)

    def _ask(self) -> None:
        """Open every batch that may begin now. How many prompts dynamic sampling takes is known only when a batch is full, so there
        the next one waits for it.
        """
        waits = bool(self.config.train.dynamic_sampling)
        while not (waits and self.batches and self.batches[-1].made is None):
            step = self.window.opened(self.version)
            if step is None:
                return
            batch = Asked(step, Filling.of(self.config, waits, self.window.updates))
            self.batches.append(batch)
            self._cut(batch)

    def _cut(self, batch: Asked) -> None:
        """The prompts of a batch's next round, in parts."""
        count = min(self.config.cluster.rollout_workers, batch.filling.prompts)
        prompts = self.stream.take(batch.filling.prompts)
        batch.parts, batch.taken = [None] * count, self.stream.taken
        edges = [len(prompts) * i // count for i in range(count + 1)]
        self.pieces.extend(Piece(batch, i, prompts[edges[i] : edges[i + 1]]) for i in range(count))

    def _give(self) -> None:
        for worker in self.workers:
            if worker.pid and worker.piece is None and self.pieces:
                piece = worker.piece = self.pieces.popleft()
                piece.version = self.version
                asked = dumps(list(piece.prompts)), piece.batch.step, self.version, [self.weights]
                self._call(worker, worker.actor.sample, *asked)

    def _hand_over(self) -> None:
        while self.batches and self.batches[0].made is not None:
            batch = self.batches.popleft()
            spent: Counter[str] = Counter()
            for each in self.spent.values():
                spent.update(each)
            told = {"time/sample_s": batch.seconds, "sampling/workers_lost": float(self.lost)}
            batch.made = replace(batch.made, spent=dict(spent), told=told)
            self.outbox.put(batch)
