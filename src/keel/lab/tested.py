"""The range that a study covers: models, tasks, sizes and versions, from the configurations and manifests of its runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from keel.lab.differences import TOLD, manifest_of
from keel.lab.job import Job
from keel.lab.places import BUILT
from keel.lab.study import Study
from keel.settings import dotted, merged

SETTINGS = {
    "model": "model",
    "task": "task",
    "recipe": "recipe",
    "steps": "steps",
    "prompts_per_step": "train.prompts_per_step",
    "group_size": "train.group_size",
    "updates_per_batch": "train.updates_per_batch",
    "lr": "train.lr",
    "max_completion_tokens": "sampling.max_completion_tokens",
}


class Tested(BaseModel):
    """Every value that some run of a study had, once.

    Args:
        parameters: of the models that were loaded; empty before the first run.
        items: completions of one evaluation of what is trained, as many as the task has prompts for.
        panel: further tasks that were evaluated.
        revisions: of keel, with how many runs were begun at each; "+" = with changes that are in no revision.
        versions: of packages, by name.
        hours: that the runs took, one after the other.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: tuple[str, ...]
    parameters: tuple[int, ...]
    recipe: tuple[str, ...]
    task: tuple[str, ...]
    steps: tuple[int, ...]
    prompts_per_step: tuple[int, ...]
    group_size: tuple[int, ...]
    updates_per_batch: tuple[int, ...]
    lr: tuple[float, ...]
    max_completion_tokens: tuple[int, ...]
    items: tuple[int, ...]
    panel: tuple[str, ...]
    revisions: dict[str, int]
    versions: dict[str, tuple[str, ...]]
    hours: float


def covered(jobs: Sequence[Job]) -> Tested:
    """What these runs cover, whether or not they have begun."""
    settings = [dotted(job.config) for job in jobs]
    manifests = [manifest_of(job.out) for job in jobs]
    begun = [each for each in manifests if each]
    return Tested(
        **{
            name: _distinct(_as_written(each[setting], job) for job, each in zip(jobs, settings, strict=True))
            for name, setting in SETTINGS.items()
        },
        parameters=_distinct(each["model"]["parameters"] for each in begun if "parameters" in each.get("model", {})),
        items=_distinct(_items(each, found) for each, found in zip(settings, manifests, strict=True)),
        panel=_distinct(task for each in settings for task in each["evaluation.panel"]),
        revisions=dict(Counter(_revision(each) for each in begun).most_common()),
        versions={name: _distinct(str(each.get("versions", {}).get(name)) for each in begun) for name in TOLD},
        hours=sum(map(_seconds, jobs)) / 3600,
    )


def planned(study: Study, quick: bool = False) -> Tested:
    """What a study is going to cover, by its file."""
    return covered([
        Job(arm.name, 0, Path("nowhere"), arm.config.model_dump(mode="json")) for arm in study.resolved_arms(quick)
    ])  # fmt: skip


def plan_of(study: Study, quick: bool) -> dict[str, Any]:
    """What decides about the runs of a study but their seeds, as its file has it."""
    return {
        "base": dotted(merged(study.base, study.quick if quick else {})),
        "arms": study.overlays(),
        "sweep": {name: list(values) for name, values in study.sweep.items()},
        "build": study.build,
        "models": {name: wanted.model_dump(exclude_defaults=True) for name, wanted in study.models.items()},
    }


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _as_written(value: Any, job: Job) -> Any:
    """A setting as the study's file has it: where what the study builds lies is not told."""
    if isinstance(value, str) and len(job.out.parents) > 1:
        for mark in BUILT:
            value = value.replace(str(job.out.parents[1] / mark[1:-1]), mark)
    return value


def _items(settings: dict[str, Any], manifest: dict[str, Any]) -> int:
    prompts = settings["evaluation.prompts"]
    return min(prompts, manifest.get("task", {}).get("test", prompts)) * settings["evaluation.samples"]


def _revision(manifest: dict[str, Any]) -> str:
    git = manifest.get("git") or {}
    return str(git.get("revision") or "unknown")[:7] + "+" * bool(git.get("changed"))


def _seconds(job: Job) -> float:
    place = job.out / "summary.json"
    return float(json.loads(place.read_text(encoding="utf-8")).get("seconds") or 0.0) if place.is_file() else 0.0
