"""One run on disk: its resolved settings, where it came from, what was measured, what was said, and what it came to.

config.toml, manifest.json, metrics.jsonl (one object per optimizer step; step 0 is the evaluation before),
rollouts.jsonl (one per completion), tokens.jsonl (single tokens of a few completions), health.jsonl (what cannot be, one
line a step), summary.json, curves.png, checkpoints/. A folder appears with its config and manifest in it, or not at all.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w

from keel.config import RunConfig, load_config
from keel.diagnostics.health import Impossible
from keel.errors import KeelError
from keel.files import append_jsonl, cut_jsonl, disk_error, json_of, read_jsonl, write_atomically, written
from keel.types import Group, Score

LONGEST_SAID = 400  # characters of an answer that was taken from a completion


@dataclass(frozen=True)
class RunFolder:
    """The place of one run. Make one by `create` or `open`."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig, manifest: Mapping[str, Any]) -> RunFolder:
        """A new folder that holds the settings and the manifest.

        Raises:
            KeelError: it exists already, or cannot be written.
        """
        path = place_of(config)
        draft = path.with_name(f".draft-{path.name}-{os.getpid()}")
        try:
            draft.mkdir(parents=True)
            (draft / "config.toml").write_text(toml_of(config.replaced({"out": str(path)})), encoding="utf-8")
            (draft / "manifest.json").write_text(json_of(manifest), encoding="utf-8")
            os.rename(draft, path)
        except OSError as fault:
            shutil.rmtree(draft, ignore_errors=True)
            raise disk_error(fault, "run folder", path) from fault
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A folder that a run has made.

        Raises:
            KeelError: it is not one.
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            found = "has no config.toml" if path.is_dir() else "does not exist"
            raise KeelError(
                f"{str(path)!r} is not a run folder: it {found}. Expected a folder that `keel train` made, such as "
                f"{_an_example(path)}."
            )
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.jsonl"

    @property
    def health(self) -> Path:
        return self.path / "health.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def config(self) -> RunConfig:
        return load_config(str(self.path / "config.toml"))

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    def rows(self) -> list[dict[str, Any]]:
        """Every step's metrics so far."""
        return list(read_jsonl(self.metrics))

    def add_rollouts(self, step: int, groups: Iterable[Group]) -> None:
        """What was asked, said and graded in the batch whose first update was `step`."""
        append_jsonl(self.rollouts, (row for group in groups for row in _rollout_rows(step, group)))

    def add_tokens(self, step: int, traces: Iterable[Mapping[str, Any]], most_bytes: float) -> None:
        """Single tokens of completions as the update `step` saw them; none any more once the file has reached its size."""
        if not self.tokens.exists() or self.tokens.stat().st_size < most_bytes:
            append_jsonl(self.tokens, ({"step": step, **trace} for trace in traces))

    def add_health(self, step: int, found: Iterable[Impossible]) -> None:
        """One line a step: what in it cannot be; an empty list where nothing was found."""
        append_jsonl(self.health, [{"step": step, "found": [vars(each) for each in found]}])

    def cut_back(self, step: int) -> None:
        """Forget everything after `step`, and lines that a killed process left unfinished: the run goes on from
        there.
        """
        for path in (self.metrics, self.rollouts, self.tokens, self.health):
            cut_jsonl(path, step)

    def rewrite_config(self, config: RunConfig) -> None:
        """Replace the settings (a run that goes on for longer)."""
        with written("config.toml", self.path):
            write_atomically(self.path / "config.toml", toml_of(config))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what the run came to."""
        with written("summary.json", self.path):
            write_atomically(self.path / "summary.json", json_of(summary))


class WatchedFolder(RunFolder):
    """A run's folder as every rank but the first has it: to be read. What there is to write, the first one writes."""

    def add_rollouts(self, step: int, groups: Iterable[Group]) -> None: ...

    def add_tokens(self, step: int, traces: Iterable[Mapping[str, Any]], most_bytes: float) -> None: ...

    def add_health(self, step: int, found: Iterable[Impossible]) -> None: ...

    def cut_back(self, step: int) -> None: ...

    def rewrite_config(self, config: RunConfig) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


def place_of(config: RunConfig) -> Path:
    """Where a new run goes: `out` as given, or the next free name below runs/.

    Raises:
        KeelError: `out` is a folder with something in it, or a file.
    """
    if config.out:
        path = Path(config.out)
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise KeelError(
                f"The run folder {config.out!r} exists already. Expected a new one: nothing is ever overwritten. Go "
                f"on with that run by `keel train --resume {config.out}`, choose another --out, or delete it."
            )
        return path
    parts = (config.recipe, config.model, config.task, f"seed{config.seed}")
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.")[-48:] for part in parts)
    taken = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10**6))
    return next(path for path in taken if not path.exists())


def toml_of(config: RunConfig) -> str:
    """Settings as TOML; a setting that is none is left out, which means the same."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def environment() -> dict[str, Any]:
    """Versions that a result depends on. Says nothing of the machine's name or its user."""
    packages = ("keel-rl", "torch", "transformers", "tokenizers", "numpy", "safetensors", "peft")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages if _version(name)},
        "git": git_revision(Path(__file__).parent),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout that keel runs from, and whether files differ from it; None outside a checkout."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        tracked = _git(folder, "ls-files", "--error-unmatch", "errors.py")
        return {"revision": revision, "changed": bool(_git(folder, "status", "--porcelain", "--", "."))} if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _rollout_rows(step: int, group: Group) -> Iterator[dict[str, Any]]:
    for completion, score in zip(group.completions, group.scores, strict=True):
        yield {
            "step": step,
            "prompt_id": group.prompt.id,
            "sample": completion.sample,
            "prompt": group.prompt.text,
            "completion": completion.text,
            "answer": group.prompt.answer,
            "reward": score.value,
            "correct": score.correct,
            "finish": completion.finish,
            "tokens": len(completion.token_ids),
        } | _told(score)


def _told(score: Score) -> dict[str, Any]:
    """What the reward keeps beside its value, where it keeps something."""
    said = {"said": score.said[:LONGEST_SAID]} if score.said else {}
    if not score.scorable:
        return {"unscorable": score.reason} | said
    told = ({"parts": dict(score.parts)} if score.parts else {}) | ({"reason": score.reason} if score.reason else {})
    return told | said


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def _an_example(path: Path) -> str:
    near = path.parent if path.parent.is_dir() else Path("runs")
    found = sorted(place.parent for place in near.glob("*/config.toml"))
    return str(found[-1]) if found else "runs/solid-tiny-dense-arithmetic-medium-seed0"
