"""In what exactly arms differ: before they run by their settings, and afterwards by what their folders hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.config import RunConfig, load_config
from keel.errors import KeelError
from keel.objectives.papers import choices
from keel.run_folder import environment
from keel.settings import dotted

OF_RECIPE = ("objective", "train.dynamic_sampling", "train.updates_per_batch")  # what a recipe's name decides
OF_RUNNER = ("seed", "out", "train.threads", "evaluation.standard_panel")  # what the runner sets for each run
TOLD = ("keel-rl", "torch", "transformers")  # versions that a reader must know of where they differ


def in_full(config: RunConfig) -> dict[str, Any]:
    """Every resolved setting by its dotted name, the recipe taken apart into its choices."""
    told = dotted(config.resolved().model_dump(mode="json", exclude={"objective": True}))
    chosen = {f"objective.{name}": value for name, value in choices(config.chosen()).items()}
    return told | {name: value for name, value in chosen.items() if f"train.{name.partition('.')[2]}" not in told}


def difference(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """Settings that are not the base's, with their values."""
    ours, theirs = in_full(config), in_full(base)
    return {name: value for name, value in ours.items() if theirs.get(name) != value}


def check_difference(arm: str, changes: Iterable[str], found: Mapping[str, Any]) -> None:
    """See that an arm differs in what it says, and in what follows from that, alone.

    Args:
        changes: dotted settings of its overlay.
        found: its difference from the base.

    Raises:
        KeelError: there is more, or it sets what the runner sets.
    """
    said = list(changes)
    if held := [name for name in said if name in OF_RUNNER]:
        raise KeelError(
            f"Arm {arm!r} sets {', '.join(held)}. Expected none of {', '.join(OF_RUNNER)}: the runner sets them, for all."
        )
    allowed = [*said, *(OF_RECIPE if "recipe" in said else ())]
    hidden = [f"{name} = {value}" for name, value in found.items() if not any(_related(name, key) for key in allowed)]
    if hidden:
        raise KeelError(
            f"Arm {arm!r} says that it changes {', '.join(said) or 'nothing'}, and it differs in {', '.join(hidden)} too. "
            "Expected no difference that an arm does not say: name it in the arm, or keep what brings it (a plugin?) in the base."
        )


def _related(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_folder(place: Path, settings: Mapping[str, Any]) -> None:
    """See that a run folder, if there is one, holds the run with these settings.

    Raises:
        KeelError: it is another run, or of a version whose settings are not today's.
    """
    if not (place / "config.toml").is_file():
        return
    try:
        found = load_config(str(place / "config.toml"))
    except KeelError as fault:
        raise KeelError(
            f"{place} was made by keel {_versions(place).get('keel-rl', '?')}, and this is keel "
            f"{environment()['versions'].get('keel-rl', '?')}, which cannot read its settings: {fault} Take another --out."
        ) from None
    ours, theirs = in_full(RunConfig(**settings)), in_full(found)
    names = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name) and name not in OF_RUNNER[1:]]
    if names:
        told = ", ".join(f"{name} {theirs.get(name)} (the study: {ours.get(name)})" for name in sorted(names))
        raise KeelError(
            f"{place} holds a run with other settings: {told}. Expected the study's own. Take another --out, or delete it."
        )


def check_origins(places: Sequence[Path]) -> tuple[str, ...]:
    """See that all runs began with the same data and weights where they name the same, and tell what else differs.

    Returns:
        Sentences on versions that are not the same for all.

    Raises:
        KeelError: data or weights of one name are not the same.
    """
    manifests = {place: found for place in places if (found := manifest_of(place))}
    for what in ("model", "task"):
        _check_one(what, {place: told[what] for place, told in manifests.items() if what in told})
    told = [
        _counted(name, Counter(str(each.get("versions", {}).get(name)) for each in manifests.values() if each)) for name in TOLD
    ]
    revisions = Counter(str((each.get("git") or {}).get("revision", ""))[:7] for each in manifests.values() if each)
    return tuple(filter(None, [*told, _counted("revision of keel", revisions)]))


def _check_one(what: str, found: Mapping[Path, Mapping[str, Any]]) -> None:
    first: dict[str, tuple[Path, str]] = {}
    for place, told in found.items():
        before, known = first.setdefault(told["name"], (place, told["hash"]))
        if told["hash"] != known:
            raise KeelError(
                f"{place} and {before} began with different versions of the {what} {told['name']!r}: {told['hash'][:12]}… and "
                f"{known[:12]}…. Expected the same for all arms: this is a second difference. Run those of one kind again."
            )


def _counted(name: str, found: Counter[str]) -> str:
    if len(found) < 2:
        return ""
    return f"Runs differ in {name}: {', '.join(f'{value} ({count} runs)' for value, count in found.most_common())}."


def manifest_of(place: Path) -> dict[str, Any]:
    file = place / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _versions(place: Path) -> dict[str, str]:
    return manifest_of(place).get("versions", {})
