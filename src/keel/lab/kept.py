"""Results that are kept: a file for each study, of which a ledger of claims is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from keel.errors import KeelError
from keel.files import write_atomically
from keel.lab.places import folder_name
from keel.lab.results import compact
from keel.lab.tested import Tested


class _Kept(BaseModel):
    """A part of results.json: what a ledger does not need is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class KeptPrediction(_Kept):
    """A prediction and what became of it; names as in `verdicts.Verdict`. None where there is no number."""

    says: str
    verdict: str
    words: str
    arm: str
    against: str
    metric: str
    at: str
    expect: str
    margin: float
    scale: str
    mean: float | None
    low: float | None
    high: float | None
    low90: float | None
    high90: float | None
    hint: tuple[str, ...]


class KeptArm(_Kept):
    """How the runs of one arm ended: `runs` were planned, `ended` did so, well or badly, and `failed` of those badly."""

    arm: str
    runs: int
    ended: int
    failed: int
    collapsed: int
    failures: dict[str, str]


class Kept(_Kept):
    """What a ledger says of one study, from the file that `keel study` wrote. `plan` is of `tested.plan_of`."""

    study: str
    question: str
    source: str
    command: str
    seeds: int
    quick: bool
    rule: str
    range: Tested
    plan: dict[str, Any]
    predictions: tuple[KeptPrediction, ...]
    arms: tuple[KeptArm, ...]
    notes: tuple[str, ...]


def read_kept(folder: Path) -> dict[str, Kept]:
    """Every study that is kept in a folder, by its name.

    Raises:
        KeelError: a file is not one of results, or of another version of keel.
    """
    if not folder.is_dir():
        raise KeelError(f"There is no folder {str(folder)!r}. Expected one that `keel study NAME --keep {folder}` wrote to.")
    found = {path: _read(path) for path in sorted(folder.glob("*.json"))}
    for path, kept in found.items():
        if path != place_of(kept.study, folder):
            raise KeelError(
                f"{path} holds results of study {kept.study!r}. Expected them in {place_of(kept.study, folder)}: rename it."
            )
    return {kept.study: kept for kept in found.values()}


def place_of(study: str, folder: Path) -> Path:
    """The file of one study."""
    return folder / f"{folder_name(study)}.json"


def picture_of(study: str, folder: Path) -> Path:
    """Its picture beside it."""
    return folder / f"{folder_name(study)}.png"


def check_keep(study: str, folder: Path, quick: bool, ended: int | None = None) -> None:
    """See that results that are kept already do not say more than new ones.

    Args:
        ended: runs of the new ones; None before the first run.

    Raises:
        KeelError: these are of the quick size, or come from fewer runs, and those are not.
    """
    place = place_of(study, folder)
    before = _raw(place) if place.exists() else {"quick": True}
    rows = [row for row in before.get("arms") or [] if isinstance(row, Mapping)]
    known = sum(int(row.get("ended", 0)) for row in rows)
    if quick and not before.get("quick", False):
        told = "results of the full size, and these are of the quick one"
    elif quick == bool(before.get("quick", False)) and ended is not None and ended < known:
        told = f"results of {known} runs, and these are of {ended}"
    else:
        return
    raise KeelError(f"{place} holds {told}. Expected no less than what is there. Leave out --keep, or delete the file.")


def keep_results(record: Mapping[str, Any], folder: Path) -> Path:
    """Write a study's record (of `Results.record`) into a folder, in place of one that says no more, and its picture.

    Returns:
        the record's file.
    """
    from keel.lab.picture import picture

    check_keep(record["study"], folder, record["quick"], sum(row["ended"] for row in record["arms"]))
    folder.mkdir(parents=True, exist_ok=True)
    place = place_of(record["study"], folder)
    write_atomically(place, compact(record))
    write_atomically(picture_of(record["study"], folder), picture(json.loads(compact(record))))
    return place


def _raw(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise KeelError(f"{path} is no JSON: {fault}. Expected results of a study. {_again(path)}") from None
    if not isinstance(found, dict):
        raise KeelError(f"{path} holds no table. Expected results of a study. {_again(path)}")
    return found


def _read(path: Path) -> Kept:
    try:
        return Kept(**_raw(path))
    except ValidationError as fault:
        found = fault.errors(include_url=False)
        lacks = [_where(each) for each in found if each["type"] == "missing"]
        wrong = [f"{_where(each)} is {str(each['input'])[:60]!r}" for each in found if each["type"] != "missing"]
        told = "; ".join([*([f"it lacks {_some(lacks)}"] if lacks else []), *([_some(wrong)] if wrong else [])])
        raise KeelError(
            f"{path} is not as this version of keel writes results: {told}. Expected what `keel study` writes. {_again(path)}"
        ) from None


def _where(fault: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in fault["loc"])


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def _again(path: Path) -> str:
    return (
        f"Judge its runs again by `keel study {path.stem} --judge --keep {path.parent}` (--out names their folder), "
        "or delete the file."
    )
