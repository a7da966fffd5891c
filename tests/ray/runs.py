"""Small runs on a cluster, as a user has them, and what they must have trained on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from keel.config import RunConfig
from keel.files import last_row, read_jsonl
from keel.tasks.task import get_task
from keel.training.buffer import PromptStream

SMALL = {
    "train.prompts_per_step": 4,
    "train.group_size": 4,
    "train.lr": 1e-3,
    "train.threads": 1,
    "sampling.max_completion_tokens": 16,
    "engine.threads": 1,
    "engine.timeout_s": 120.0,
    "cluster.rollout_workers": 2,
}


def settings_of(cluster, steps: int = 6, **changes) -> RunConfig:
    return RunConfig(steps=steps).replaced(SMALL | {"cluster.ray": cluster.address} | changes).resolved()


def expected_ids(settings: RunConfig, batches: int, size: int = 4) -> list[str]:
    return [prompt.id for prompt in PromptStream(get_task(settings.task).train, settings.seed).take(batches * size)]


def begun(cluster, out: Path, steps: int, *flags: str, before: tuple[str, ...] = (), workers: int = 2) -> subprocess.Popen:
    """`keel train --ray`, on its way.

    Args:
        before: words before `-m keel`.
    """
    short = {"evaluation.prompts": 4, "evaluation.samples": 1, "evaluation.every": 0, "evaluation.standard_panel": "false"}
    small = {"train.max_staleness": 2, "checkpoint.every": 5, "steps": steps, "out": out} | SMALL | short
    words = [f"--{name}={value}" for name, value in small.items() if not name.startswith("cluster")]
    keel = [sys.executable, *before, "-m", "keel", "train", "solid"]
    command = [*keel, "--ray", cluster.address, "--rollout-workers", str(workers), *words, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resumed(out: Path) -> str:
    command = [sys.executable, "-m", "keel", "train", "--resume", str(out), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def step_of(out: Path) -> int:
    """How far a run is."""
    return (last_row(out / "metrics.jsonl") or {"step": 0})["step"]


def check_whole(out: Path, settings: RunConfig, staleness: int = 2) -> None:
    """A run that ended has trained on every completion of every prompt in turn, each once, and none too stale."""
    steps, size, group = settings.steps, settings.train.prompts_per_step, settings.train.group_size
    metrics = list(read_jsonl(out / "metrics.jsonl"))
    assert [row["step"] for row in metrics] == list(range(steps + 1))
    assert all(row["train/staleness_max"] <= staleness for row in metrics[1:])
    found = [(row["step"], row["prompt_id"]) for row in read_jsonl(out / "rollouts.jsonl")]
    ids = expected_ids(settings, steps, size)
    assert found == [(1 + n // size, ids[n]) for n in range(steps * size) for _ in range(group)]
