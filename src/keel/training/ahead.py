"""Rollouts ahead of training: a worker process samples the next batches while the trainer learns from this one.

Batches are used in the order in which they were asked for, whole, so that neither short completions nor easy prompts come first.
A batch is asked for only when its last update cannot be more than `max_staleness` versions younger than the weights at hand; the
worker takes the newest weights when it begins, so it may be fresher, never staler.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from keel.config import RunConfig
from keel.errors import KeelError
from keel.training.buffer import Collected, PromptStream
from keel.training.transfer import dumps, loads
from keel.training.window import Window

START_S = 300.0  # how long a worker may take to load its model


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in one flat buffer that two processes share."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Layout:
        starts, end = [], 0
        for tensor in weights.values():
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // 16) * 16
        shapes, dtypes = tuple(tuple(t.shape) for t in weights.values()), tuple(t.dtype for t in weights.values())
        return cls(tuple(weights), shapes, dtypes, tuple(starts), end)

    def views(self, buffer: UInt8[Tensor, " bytes"]) -> dict[str, Tensor]:
        """The tensors themselves, in the buffer's memory."""
        found = {}
        for name, shape, dtype, start in zip(self.names, self.shapes, self.dtypes, self.starts, strict=True):
            count = torch.Size(shape).numel() * dtype.itemsize
            found[name] = buffer[start : start + count].view(dtype).view(shape)
        return found


@dataclass(frozen=True)
class Made:
    """One batch from the worker.

    Args:
        collected: its groups.
        version: weights that it was begun with.
        taken: prompts consumed, up to and with this batch.
    """

    collected: Collected
    version: int
    taken: int


class Ahead:
    """Batches from a worker process.

    Args:
        config: resolved; the worker loads its own model, engine and task from it.
        weights: as version `version`; shared with the worker from here on.
        stream: the trainer's place in the data, kept at the last batch that was used; the worker's own runs ahead.
        schedule: version of each batch, to replay a run exactly: the worker then gets those weights and no newer ones.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: Mapping[str, Tensor],
        version: int,
        stream: PromptStream,
        schedule: Sequence[int] | None = None,
    ):
        self.config, self.version, self.stream, self.schedule = config, version, stream, schedule
        if schedule is not None and config.train.partial_rollouts:
            raise KeelError(
                "A schedule tells one version for each batch, and with train.partial_rollouts tokens of one completion have "
                "several. Expected one of them: replay a schedule of whole batches, or sample partial rollouts without one."
            )
        self.window = Window(config, version, schedule)
        self.layout = Layout.of(weights)
        self.buffer = torch.zeros(self.layout.size, dtype=torch.uint8).share_memory_()
        context = multiprocessing.get_context("spawn")
        self.lock, self.shared_version = context.Lock(), context.Value("q", version, lock=False)
        self._copy(weights)
        self.pipe, theirs = context.Pipe()
        given = (config.model_dump(mode="json"), self.layout, self.buffer, self.lock, self.shared_version, theirs, stream.taken)
        serves = config.engine.name != "local"  # then the worker starts processes of its own, which a daemon may not
        self.patience = 20.0 if serves else 0.5
        self.worker = context.Process(target=_work, args=given, daemon=not serves, name="keel-rollouts")
        self.worker.start()
        atexit.register(self.close)
        theirs.close()
        self._receive(START_S)

    def collect(self, step: int) -> Collected:
        """The oldest batch that was asked for, once it is there.

        Raises:
            KeelError: the worker failed, died, or did not answer within `engine.timeout_s`.
        """
        self._ask()
        made: Made = self._receive(self.config.engine.timeout_s)
        self.stream.taken = made.taken
        self.window.use(step, made.version)
        self._ask()
        return made.collected

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Hand over new weights; the worker takes them when it begins its next batch."""
        self.version = version
        self._copy(weights)
        self._ask()

    def close(self) -> None:
        """End the worker: kindly, then by its process id."""
        if self.worker.is_alive():
            try:
                self.pipe.send_bytes(dumps(None))
            except OSError:
                pass
            self.worker.join(self.patience)
        if self.worker.is_alive():
            self.worker.kill()
            self.worker.join(5.0)
        self.pipe.close()
        atexit.unregister(self.close)

    def _ask(self) -> None:
        """Ask for every batch that may begin now."""
        while (step := self.window.opened(self.version)) is not None:
            weights = None if self.schedule is None else self.buffer.numpy().tobytes()
            try:
                self.pipe.send_bytes(dumps((step, self.version, weights)))
            except OSError:
                raise KeelError(self._death()) from None

    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        self._until(lambda: self.lock.acquire(timeout=0.2), self.config.engine.timeout_s)
        try:
            views = self.layout.views(self.buffer)
            for name, tensor in weights.items():
                views[name].copy_(tensor)
            self.shared_version.value = self.version
        finally:
            self.lock.release()

    def _death(self) -> str:
        self.worker.join(1.0)
        return (
            f"The rollout worker died (exit code {self.worker.exitcode}). Nothing that was saved is lost: go on with "
            "`keel train --resume`. If it was killed for memory, lower train.prompts_per_step or train.max_staleness."
        )

    def _silence(self, timeout: float) -> str:
        return (
            f"The rollout worker gave no answer within {timeout:g} s. Expected a batch by then; raise "
            "engine.timeout_s if batches take longer, or look at what the engine is waiting for."
        )

    def _until(self, done: Callable[[], bool], timeout: float) -> None:
        """Wait, but neither for a dead worker nor longer than `timeout` seconds."""
        end = time.monotonic() + timeout
        while not done():
            if not self.worker.is_alive() and not done():
                raise KeelError(self._death())
            if time.monotonic() > end:
                raise KeelError(self._silence(timeout))

    def _receive(self, timeout: float) -> Any:
        self._until(lambda: self.pipe.poll(0.2), timeout)
        try:
            kind, answer = loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):  # the latter where it left what it was asked unread
            raise KeelError(self._death()) from None
        if kind == "failed":
            raise KeelError(f"The rollout worker failed: {answer}")
        return answer


def _work(
    settings: dict[str, Any],
    layout: Layout,
    buffer: Tensor,
    lock: Any,
    shared_version: Any,
    pipe: Connection,
    taken: int,
) -> None:
    """The worker: one batch for each request, until it is told to stop or nobody is there any more."""
    from keel.training.rollouts import sampler_of

    sampler = None
    try:
        config = RunConfig(**settings)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
        sampler = sampler_of(config, config.engine.threads or max(1, torch.get_num_threads() // 2), taken)
        engine, newest = sampler.engine, layout.views(buffer)

        def renew(always: bool = False) -> bool:
            if not always and shared_version.value == engine.version:
                return False
            with lock:
                engine.load(newest, int(shared_version.value))
            return True

        renew(always=True)
        if config.train.partial_rollouts:
            engine.renew = renew
        pipe.send_bytes(dumps(("ready", None)))
        while (request := loads(pipe.recv_bytes())) is not None:
            step, wanted, replayed = request
            if replayed is not None:
                engine.load(layout.views(torch.frombuffer(bytearray(replayed), dtype=torch.uint8)), wanted)
            else:
                renew()
            version = engine.version
            made = Made(sampler.batch(step), version, sampler.stream.taken)
            pipe.send_bytes(dumps(("made", made)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except BaseException as error:  # whatever it was, the trainer must hear of it
        told = str(error) if isinstance(error, KeelError) else traceback.format_exc()
        pipe.send_bytes(dumps(("failed", told)))
    finally:
        if sampler is not None:
            getattr(sampler.engine, "close", lambda: None)()
