"""Rubrics: what a completion has to bring, point by point, and how much each point counts. Written in TOML.

name = "proof"
pass_at = 0.8                      # correct from this score on, if every essential point is earned and no pitfall met

[[criteria]]
name = "states_result"
kind = "essential"                 # essential 1, important .7, optional .3, pitfall −.9, unless weight says otherwise
says = "The completion ends with an explicit final result."
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from keel.config import Section
from keel.errors import KeelError, nearest
from keel.settings import kind as kind_of
from keel.settings import read_toml
from keel.types import Score

Kind = Literal["essential", "important", "optional", "pitfall"]
WEIGHTS: Mapping[str, float] = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": -0.9}
_NAME = re.compile(r"[A-Za-z_][\w\-]{0,39}")


class Criterion(Section):
    """One point of a rubric."""

    name: str = Field(description="letters, digits, _ and -; it becomes part of a metric's name")
    says: str = Field(min_length=1, description="what has to be true of the completion, in a sentence")
    kind: Kind = Field("important", description="how much the point matters")
    weight: float | None = Field(None, description="what it counts; below 0 for a pitfall, above 0 else; none = the kind's")
    levels: tuple[float, ...] = Field((0.0, 1.0), description="shares of the point that can be earned, from 0 to 1")

    @field_validator("name")
    @classmethod
    def _a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise KeelError(f"A criterion is named {name!r}. Expected 1 to 40 letters, digits, _ and -, such as 'states_result'.")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Criterion:
        if self.weight is not None and (self.weight < 0) != (self.kind == "pitfall") or self.weight == 0:
            raise KeelError(
                f"Criterion {self.name!r} is {self.kind} with weight {self.weight}. Expected a weight "
                f"{'below' if self.kind == 'pitfall' else 'above'} 0: a pitfall takes away, every other kind adds."
            )
        if list(self.levels) != sorted(set(self.levels)) or self.levels[:1] != (0.0,) or self.levels[-1:] != (1.0,):
            raise KeelError(f"Criterion {self.name!r} has levels {list(self.levels)}. Expected a rising list from 0 to 1.")
        return self

    @property
    def counts(self) -> float:
        """Its weight, or its kind's."""
        return WEIGHTS[self.kind] if self.weight is None else self.weight


class Rubric(Section):
    """Points and their weights. score = Σ wⱼ cⱼ / Σ₊ wⱼ, clipped to [0, 1]; cⱼ in [0, 1] is how much of point j is earned, and
    Σ₊ takes the positive weights only, so that a completion with every point and no pitfall scores 1.

    Source: Rubrics as Rewards, arXiv 2507.17746, explicit aggregation. Differs from it: there a pitfall is put as "avoids …" with a
    positive weight; here it is put as what happens, and takes away.
    """

    name: str = Field("rubric", description="what the rubric is called")
    instructions: str = Field("", description="what the judge should know beyond the points")
    judging: Literal["together", "apart"] = Field("together", description="one question for all points, or one for each")
    pass_at: float = Field(0.5, ge=0, le=1, description="correct from this score on, with every essential point and no pitfall")
    criteria: tuple[Criterion, ...] = Field(min_length=1, description="the points")

    @model_validator(mode="after")
    def _whole(self) -> Rubric:
        names = [criterion.name for criterion in self.criteria]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise KeelError(f"Rubric {self.name!r} has two criteria named {twice!r}. Expected a name of its own for each.")
        if all(criterion.counts < 0 for criterion in self.criteria):
            raise KeelError(
                f"Rubric {self.name!r} has only pitfalls, so that nothing can be earned. Expected a positive criterion."
            )
        return self

    @property
    def hash(self) -> str:
        """Of everything that can change a verdict."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]

    def score(self, earned: Mapping[str, float], reason: str = "") -> Score:
        """The score for what was earned; each point's share is kept as the part "point.NAME".

        Args:
            earned: every criterion's name → a share in [0, 1].

        Raises:
            KeelError: a criterion is missing, an unknown one is named, or a share is outside [0, 1].
        """
        wrong = earned.keys() ^ {criterion.name for criterion in self.criteria}
        if wrong or not all(0 <= share <= 1 for share in earned.values()):
            raise KeelError(f"Earned are {dict(earned)} of rubric {self.name!r}. Expected a share in [0, 1] for each criterion.")
        best = sum(criterion.counts for criterion in self.criteria if criterion.counts > 0)
        total = sum(criterion.counts * earned[criterion.name] for criterion in self.criteria)
        value = min(1.0, max(0.0, total / best))
        needed = all(earned[c.name] == float(c.kind == "essential") for c in self.criteria if c.kind in ("essential", "pitfall"))
        parts = {f"point.{name}": float(share) for name, share in earned.items()}
        return Score(value, needed and value >= self.pass_at - 1e-12, reason, parts)


def load_rubric(source: str | Path | Mapping[str, Any]) -> Rubric:
    """A rubric from a TOML file or a table.

    Raises:
        KeelError: there is no such file, it is no TOML, or a setting is unknown, missing or out of range; says which.
    """
    table = source if isinstance(source, Mapping) else read_toml(Path(source).expanduser())
    where = "The rubric" if isinstance(source, Mapping) else f"Rubric {str(source)!r}"
    try:
        return Rubric(**table)
    except ValidationError as found:
        raise KeelError(f"{where}: {_explained(found)}") from None


def _explained(found: ValidationError) -> str:
    place = _worst(found)["loc"]
    if place[:1] == ("criteria",) and len(place) > 1:
        return explained(found, Criterion, f"criterion {int(place[1]) + 1}")
    return explained(found, Rubric, "the rubric")


def _worst(found: ValidationError) -> dict[str, Any]:
    """A misspelt key before one that is missing: it may be the same."""
    return dict(min(found.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden"))


def explained(found: ValidationError, model: type[BaseModel], at: str) -> str:
    """One paragraph on one mistake, and how many more there are.

    Args:
        model: whose settings they are. at: what a reader calls it.
    """
    first = _worst(found)
    raised = first.get("ctx", {}).get("error")
    place, known = [str(part) for part in first["loc"]], list(model.model_fields)
    field = next((part for part in reversed(place) if part in known), "")
    if isinstance(raised, KeelError):
        said = str(raised)
    elif first["type"] == "extra_forbidden":
        said = f"{at} has no setting {place[-1]!r}: {nearest(place[-1], known)}Expected {', '.join(known)}."
    elif first["type"] == "missing":
        said = f"{at} lacks {place[-1]!r} ({_phrase(model, place[-1])}). Add it."
    elif not field:
        said = f"{at} is {first['input']!r}. Expected a table with {', '.join(known)}."
    else:
        said = f"{field} of {at} is {first['input']!r}: {first['msg'].lower()}. Expected {_phrase(model, field)}."
    more = found.error_count() - 1
    return said if not more else f"{said} ({more} more to mend after this one.)"


def _phrase(model: type[BaseModel], name: str) -> str:
    field = model.model_fields.get(name)
    return (
        "a list of tables [[criteria]]"
        if name == "criteria" or field is None
        else f"{kind_of(field.annotation)}: {field.description}"
    )
