"""Where a run comes from: versions, weights, data, template and the distribution that is really sampled. No machine,
no user.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from keel.config import RunConfig
from keel.errors import KeelError
from keel.models.policy import Policy
from keel.objectives.papers import choices
from keel.objectives.recipes import Recipe
from keel.rewards.compose import described
from keel.rollout.engine import Engine, checksum
from keel.run_folder import environment
from keel.tasks.task import Task


def manifest(config: RunConfig, policy: Policy, task: Task, engine: Engine, recipe: Recipe) -> dict[str, Any]:
    """What `manifest.json` records when a run begins."""
    return environment() | {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "model": {
            "name": config.model,
            "architecture": type(policy.base).__name__,
            "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
            "trained_parameters": sum(parameter.numel() for parameter in policy.parameters().values()),
            "context": policy.context,
            "end_ids": sorted(policy.end_ids),
            "hash": checksum(policy.weights()),
        },
        "template": policy.template.describe(),
        "task": {
            "name": task.name,
            "train": len(task.train),
            "test": len(task.test),
            "hash": task_hash(task),
            "grader": _grader(task),
        },
        "recipe": recipe.name,
        "objective": choices(recipe),
        "sampling": asdict(config.sampling.distribution()),
        "engine": engine.describe(),
        "derived": config.derived(),
    }


def _grader(task: Task) -> Any:
    """What the task's grader says of itself: two versions may decide otherwise."""
    return described(getattr(task, "grade", None))


def task_hash(task: Task) -> str:
    """32 hex digits of every prompt's id, text and answer, in order: the data, and the place of each row in it."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (task.train, task.test):
        for prompt in split:
            digest.update(json.dumps([prompt.id, prompt.text, prompt.answer]).encode())
        digest.update(b"|")
    return digest.hexdigest()


def check_same_origin(recorded: Mapping[str, Any], policy: Policy, task: Task) -> None:
    """Refuse to go on with other weights or other data than the run began with.

    Raises:
        KeelError: the freshly loaded model or task has another hash than the manifest records.
    """
    found = {"model": checksum(policy.weights()), "task": task_hash(task)}
    for what, value in found.items():
        if value != recorded[what]["hash"]:
            raise KeelError(
                f"The {what} {recorded[what]['name']!r} is not what this run began with: its hash is {value[:12]}… "
                f"and the manifest says {recorded[what]['hash'][:12]}…. Expected the same {what}, or the rest of the "
                f"run would not belong to its beginning. Put the old {what} back, or start a new run."
            )
