"""What a run left, read as far as it can be: one small type, whatever wrote the files.

`read` makes it of a run folder of keel's own. Logs of others become the same type: metrics under keel's names
(`diagnostics/metrics.py`), completions as `Rollout`s, settings as `Asked`; what is not known is empty or None, and not looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from keel.config import RunConfig
from keel.diagnostics.health import Row
from keel.doctor.weights import Weights, newest_weights
from keel.errors import KeelError
from keel.objectives.advantages import Advantage, TokenWhitening, group_mean, sibling_mean
from keel.run_folder import RunFolder
from keel.tasks import task as tasks
from keel.tasks.task import Task
from keel.types import Finish, Prompt, row_of

MOST = 200_000  # completions that are read


@dataclass(frozen=True)
class Rollout:
    """One completion as it was stored.

    Args:
        step: first optimizer step of its batch.
        reward: None where there was no verdict; `reason` may then say why.
        tokens: how long it is.
    """

    step: int
    prompt_id: str
    sample: int
    prompt: str
    completion: str
    answer: str
    reward: float | None
    correct: bool
    finish: Finish = "stop"
    tokens: int = 0
    reason: str = ""

    @property
    def cut(self) -> bool:
        return self.finish == "length"

    @property
    def right(self) -> bool:
        return self.correct and self.reward is not None


@dataclass(frozen=True)
class Asked:
    """What the settings asked for, as far as it is known; None = not known, and what depends on it is not looked at.

    Args:
        cap: of a completion, in tokens.
        staleness: versions by which a batch may lag.
        own_sampler: whether logp_old is the trainer's own, and not taken over from the engine.
        all_tensors: whether every tensor should train.
        centred: whether advantages of a group add up to 0 and depend on its rewards alone.
        constant_data: whether the prompts' difficulty does not follow the policy (no curriculum, no dynamic sampling).
    """

    group_size: int | None = None
    updates_per_batch: int | None = None
    cap: int | None = None
    staleness: int | None = None
    own_sampler: bool = True
    all_tensors: bool = False
    centred: bool = False
    constant_data: bool = True


@dataclass(frozen=True)
class Record:
    """A run as it was left.

    Args:
        source: where it lies.
        asked: of its settings.
        rows: metrics by name, in the order of their "step"; step 0 is before training. NaN = it was not finite.
        rollouts: completions, in the order of the file.
        traces: single tokens of some completions, as in tokens.jsonl.
        health: what the run itself noted as impossible; None = it kept no such record.
        task: data and reward, for grading again; None = not at hand.
        config: its settings, for asking the living system; None = they cannot be read.
        manifest: where it came from.
        weights: of the newest checkpoint; None = there is none.
        unread: what could not be read, in sentences.
    """

    source: str
    asked: Asked = Asked()
    rows: tuple[Row, ...] = ()
    rollouts: tuple[Rollout, ...] = ()
    traces: tuple[Mapping[str, Any], ...] = ()
    health: tuple[Mapping[str, Any], ...] | None = None
    task: Task | None = None
    config: RunConfig | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights | None = None
    unread: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps that were written down."""
        return int(max((row["step"] for row in self.rows), default=0))

    @cached_property
    def trained(self) -> tuple[Row, ...]:
        """Rows of optimizer steps."""
        return tuple(row for row in self.rows if row["step"] > 0)

    @cached_property
    def batches(self) -> dict[int, list[Rollout]]:
        """Completions by the first step of their batch, ascending."""
        found: dict[int, list[Rollout]] = {}
        for rollout in self.rollouts:
            found.setdefault(rollout.step, []).append(rollout)
        return dict(sorted(found.items()))

    @cached_property
    def groups(self) -> dict[int, list[list[Rollout]]]:
        """The same, completions of one prompt together."""
        return {step: list(_by_prompt(rollouts).values()) for step, rollouts in self.batches.items()}

    def prompt_of(self, rollout: Rollout) -> Prompt:
        """What was asked: the task's own row where it has one with the same text and answer, else what was stored."""
        own = self._prompts.get(row_of(rollout.prompt_id))
        if own is not None and (own.text, own.answer) == (rollout.prompt, rollout.answer):
            return own
        return Prompt(rollout.prompt_id, rollout.prompt, rollout.answer)

    @cached_property
    def _prompts(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self.task.train} if self.task is not None else {}


def _by_prompt(rollouts: Iterable[Rollout]) -> dict[str, list[Rollout]]:
    found: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt_id, []).append(rollout)
    return found


# ── a run folder of keel's own ────────────────────────────────────────────────────────────────────────────────────────


def read(path: str | Path) -> Record:
    """A run folder, whole or not.

    Raises:
        KeelError: nothing in it is a run's.
    """
    folder, unread = RunFolder(Path(path)), _Unread()
    _refuse_other(folder)
    config = _config(folder, unread)
    rollouts = [_rollout(row) for row in islice(_lines(folder.rollouts, unread), MOST)]
    if len(rollouts) == MOST:
        unread.say(f"rollouts.jsonl: only the first {MOST:,} completions were read")
    rows = [numbers(row) for row in _lines(folder.metrics, unread) if isinstance(row.get("step"), int)]
    return Record(
        source=str(path),
        asked=asked_of(config) if config is not None else Asked(),
        rows=tuple(sorted(rows, key=lambda row: row["step"])),
        rollouts=tuple(rollout for rollout in rollouts if rollout is not None),
        traces=tuple(row for row in _lines(folder.tokens, unread) if isinstance(row.get("step"), int)),
        health=tuple(row for row in _lines(folder.health, unread) if _noted(row)) if folder.health.is_file() else None,
        task=_task(config, unread),
        config=config,
        manifest=_manifest(folder, unread),
        weights=newest_weights(folder.checkpoints, unread.say),
        unread=tuple(unread.said),
    )


class _Unread:
    """Gathers what could not be read."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        if sentence not in self.said:
            self.said.append(sentence)


def _refuse_other(folder: RunFolder) -> None:
    places = (folder.path / "config.toml", folder.path / "manifest.json", folder.metrics, folder.rollouts)
    if not any(place.is_file() for place in places):
        found = "holds nothing of a run" if folder.path.is_dir() else "does not exist"
        raise KeelError(
            f"The folder {str(folder.path)!r} {found}. Expected one that `keel train` made, with at least one of "
            f"{', '.join(place.name for place in places)} in it."
        )


def _config(folder: RunFolder, unread: _Unread) -> RunConfig | None:
    try:
        return RunFolder.open(folder.path).config.replaced({"evaluation.panel": ()})
    except (KeelError, OSError, ValueError) as refused:
        unread.say(f"config.toml: {refused}")
        return None


def _task(config: RunConfig | None, unread: _Unread) -> Task | None:
    if config is None:
        return None
    try:
        return tasks.unchecked_task(config.task)
    except (KeelError, ImportError, OSError) as refused:
        unread.say(f"the task {config.task!r}: {refused}")
        return None


def _manifest(folder: RunFolder, unread: _Unread) -> Mapping[str, Any]:
    try:
        told = json.loads((folder.path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as refused:
        unread.say(f"manifest.json: {refused}")
        return {}
    return told if isinstance(told, dict) else {}


def asked_of(config: RunConfig) -> Asked:
    """What a run's settings asked for."""
    config = config.resolved()
    train = config.train
    return Asked(
        group_size=train.group_size,
        updates_per_batch=train.updates_per_batch,
        cap=config.sampling.max_completion_tokens,
        staleness=train.max_staleness + config.engine.sync_every - 1,
        own_sampler=not train.bypass_old,
        all_tensors=config.lora is None,
        centred=_centred(config),
        constant_data=not train.dynamic_sampling and train.curriculum == "none",
    )


def _centred(config: RunConfig) -> bool:
    objective = config.chosen().objective
    advantage = objective.advantage
    if objective.shaping or objective.reward_kl is not None or not isinstance(advantage, Advantage):
        return False
    return advantage.baseline in (group_mean, sibling_mean) and not isinstance(advantage.scale, TokenWhitening)


def _lines(path: Path, unread: _Unread) -> Iterator[dict[str, Any]]:
    """Rows of a file of JSON lines; what is torn or damaged is left out and said."""
    if not path.is_file():
        unread.say(f"{path.name} is missing")
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.strip():
                end = "" if line.endswith("\n") else ", the last, which was not written to its end"
                unread.say(f"{path.name}: line {number}{end} cannot be read")


def numbers(row: Mapping[str, Any]) -> Row:
    """A line's numbers alone. JSON has no NaN, so null stands for what was not finite."""
    told = {name: math.nan if value is None else value for name, value in row.items()}
    return {name: float(value) for name, value in told.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _noted(row: Mapping[str, Any]) -> bool:
    """Whether a line is one of a health record."""
    found = row.get("found")
    return isinstance(found, list) and all(isinstance(each, dict) and {"metric", "value", "why"} <= each.keys() for each in found)


def _rollout(row: Mapping[str, Any]) -> Rollout | None:
    """None where a line lacks what every completion has."""
    try:
        return Rollout(
            step=int(row["step"]),
            prompt_id=str(row["prompt_id"]),
            sample=int(row.get("sample", 0)),
            prompt=str(row["prompt"]),
            completion=str(row["completion"]),
            answer=str(row.get("answer", "")),
            reward=None if row.get("reward") is None else float(row["reward"]),
            correct=bool(row.get("correct", False)),
            finish=row["finish"] if row.get("finish") in ("stop", "length", "error") else "stop",
            tokens=int(row.get("tokens", 0)),
            reason=str(row.get("unscorable") or row.get("reason") or ""),
        )
    except (KeyError, TypeError, ValueError):
        return None


def spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)
