"""What the page shows of a study: its question, its arms, its verdicts as they stand in its files, and its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.errors import KeelError
from keel.lab.places import FAILED, folder_name
from keel.report.data import RunData, read_json, read_run
from keel.settings import dotted

TONES = {"supported": "good", "refuted": "bad", "points to it": "hint for", "points against it": "hint against"}  # others are open


@dataclass(frozen=True)
class Prediction:
    """A prediction and what became of it, in words.

    Args:
        says: as it was written before the runs.
        verdict: as `lab.verdicts` gives it, or "not judged yet".
        words: the sentence on the numbers behind it.
    """

    says: str
    verdict: str
    words: str = ""

    @property
    def tone(self) -> str:
        return TONES.get(self.verdict, "open")


@dataclass(frozen=True)
class StudyData:
    """A study folder as it is now. `planned` counts runs; `failed` is arm/seed → last line of why it failed."""

    path: Path
    plan: dict[str, Any] = field(repr=False)
    results: dict[str, Any] = field(repr=False)
    runs: tuple[RunData, ...] = field(repr=False)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def study(self) -> dict[str, Any]:
        return self.plan.get("study", {})

    @property
    def name(self) -> str:
        return str(self.study.get("name") or self.results.get("study") or self.path.name)

    @property
    def planned(self) -> int:
        return int(self.plan.get("runs") or len(self.runs))

    @property
    def ended(self) -> int:
        return sum(run.ended for run in self.runs) + len(self.failed)

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Dotted settings in which each arm differs from the base, by its name."""
        return {name: dotted(changes or {}) for name, changes in self.plan.get("arms", {}).items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The arms as results.json has them; none while the study runs."""
        found = self.results.get("arms", [])
        return [dict(row) for row in found] if isinstance(found, list) else [{"arm": k, **v} for k, v in found.items()]

    @property
    def rules(self) -> list[str]:
        """How predictions were judged, and what must be known besides."""
        found = [self.results.get("rule"), *(self.results.get("notes") or [])]
        return [f"{str(text).rstrip('.')}." for text in found if text]

    @property
    def predictions(self) -> list[Prediction]:
        """Judged ones from the results; before that, those of the plan."""
        judged = self.results.get("predictions") or self.results.get("verdicts") or []
        if judged:
            return [_prediction(each) for each in judged if isinstance(each, Mapping)]
        planned = self.study.get("predictions") or []
        if not planned and self.study.get("prediction"):
            planned = [{"says": self.study["prediction"]}]
        return [_prediction(each) for each in planned if isinstance(each, Mapping)]


def read_study(path: Path) -> StudyData:
    """A study folder, finished or not.

    Raises:
        KeelError: it is none.
    """
    plan = read_json(path / "study.json")
    if not plan:
        raise KeelError(f"{str(path)!r} is not a study folder: it has no study.json. Expected a folder that `keel study` made.")
    runs, failed = [], {}
    for arm in plan.get("arms", {}):
        place = path / folder_name(arm)
        for folder in sorted(place.glob("*/config.toml"), key=lambda found: _number(found.parent.name)):
            runs.append(read_run(folder.parent, f"{arm} · seed {folder.parent.name}", arm))
        for note in sorted(place.glob(f"*.{FAILED}")):
            lines = note.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failed[f"{arm}, seed {note.name.removesuffix('.' + FAILED)}"] = lines[-1] if lines else ""
    return StudyData(path, plan, read_json(path / "results.json"), tuple(runs), failed)


def triple(value: Any) -> tuple[float, float, float] | None:
    """(mean, low, high) of a value in results.json, whichever way it is written; None where there is no number."""
    if isinstance(value, Mapping):
        value = [value.get("mean"), value.get("low"), value.get("high")]
    if isinstance(value, int | float):
        value = [value, None, None]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3 or value[0] is None:
        return None
    mean, low, high = (math.nan if each is None else float(each) for each in value)
    return mean, low, high


def _prediction(told: Mapping[str, Any]) -> Prediction:
    verdict = str(told.get("verdict") or "not judged yet").replace("_", " ").replace("-", " ")
    words = next((str(told[name]) for name in ("words", "told", "text", "because", "why") if told.get(name)), "")
    return Prediction(str(told.get("says") or told.get("prediction") or told.get("name") or ""), verdict, words)


def _number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (10**9, name)
