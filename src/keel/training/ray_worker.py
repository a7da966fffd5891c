"""A rollout worker as an actor of a Ray cluster: a model, an engine and a task of its own, from the settings alone.

It answers in pairs, ("ready" | "made", …) or ("failed", why), so that what goes wrong here is never taken for a lost worker.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keel.errors import KeelError
from keel.ray_cluster import check_versions
from keel.training.transfer import dumps, from_arrays, loads
from keel.types import Group


@dataclass(frozen=True)
class Part:
    """What came of some prompts of a batch.

    Args:
        groups: one of each prompt, in their order.
        seconds: that it took.
        spent: what this worker's grader has used up so far.
    """

    groups: list[Group]
    seconds: float
    spent: Mapping[str, float]


class RolloutWorker:
    """Samples and grades what it is asked for, with the weights that it is told to take."""

    def begin(self, settings: dict[str, Any], expected: Mapping[str, str], folder: str) -> tuple[str, Any]:
        """Load everything; ("ready", process id).

        Args:
            settings: of the run, resolved.
            expected: versions of the packages that must be the trainer's.
            folder: that the trainer was started in; files and plugins are looked for there if this machine has it.
        """
        return _told(lambda: ("ready", self._begin(settings, expected, folder)))

    def sample(self, asked: bytes, step: int, version: int, weights: list[Any]) -> tuple[str, Any]:
        """Groups of prompts under weights of this version; ("made", a Part as bytes).

        Args:
            weights: one reference, fetched only if another version is in use.
        """
        return _told(lambda: ("made", self._sample(asked, step, version, weights)))

    def close(self) -> None:
        """End what the engine started."""
        getattr(self.sampler.engine, "close", lambda: None)()

    def _begin(self, settings: dict[str, Any], expected: Mapping[str, str], folder: str) -> int:
        check_versions(expected)
        if os.path.isdir(folder):
            os.chdir(folder)
            sys.path.insert(0, folder)  # as the command line has it, for plugins
        from keel.config import RunConfig
        from keel.training.rollouts import sampler_of

        self.config = RunConfig(**settings)
        self.sampler = sampler_of(self.config, self.config.engine.threads or 1)
        self.version = None  # the model's own weights, not the trainer's
        return os.getpid()

    def _sample(self, asked: bytes, step: int, version: int, weights: list[Any]) -> bytes:
        begin = time.perf_counter()
        if self.version != version:
            import ray

            self.sampler.engine.load(from_arrays(ray.get(weights[0], timeout=self.config.engine.timeout_s)), version)
            self.version = version
        groups = self.sampler.groups(loads(asked), step)
        return dumps(Part(groups, time.perf_counter() - begin, self.sampler.spent()))


def _told(work: Any) -> tuple[str, Any]:
    try:
        return work()
    except Exception as error:  # whatever it was, the trainer must hear of it
        return "failed", f"on {socket.gethostname()}: {_said(error)}"


def _said(error: Exception) -> str:
    if isinstance(error, KeelError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory ({str(error).splitlines()[-1] if str(error) else type(error).__name__}). Expected room for one more "
            "model and its completions: lower engine.kv_cache_gb, train.group_size or sampling.max_completion_tokens, or give each "
            "worker a machine with more memory. Nothing that was saved is lost: go on with `keel train --resume`."
        )
    return traceback.format_exc()
