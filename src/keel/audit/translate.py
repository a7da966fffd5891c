"""A TRL or verl configuration file in keel's words: which recipe it is, which of its knobs do nothing, where it leaves its paper.

print(translate("trl", "grpo_config.yaml").text())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.audit.peers.configuration import Unknown, read_file
from keel.audit.peers.defaults import TRL_VERSION, VERL_VERSION
from keel.audit.peers.overlay import as_text, overlay
from keel.audit.peers.reading import Beyond, Idle, Reading
from keel.audit.peers.trl_reading import read_trl
from keel.audit.peers.verl_reading import read_verl
from keel.errors import KeelError, nearest
from keel.objectives.objective import Objective
from keel.objectives.papers import Difference, choices, difference
from keel.objectives.recipes import RECIPES, Recipe, recipe

READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Reading], str]] = {
    "trl": (read_trl, TRL_VERSION),
    "verl": (read_verl, VERL_VERSION),
}


@dataclass(frozen=True)
class Translation:
    """What a configuration is.

    Args:
        framework, version: whose defaults fill in what the file leaves out; path: of the file.
        recipe: the nearest one's name; exact: whether the configuration is that recipe, loop included.
        objective: the configuration's loss, as far as keel has the choices.
        overlay: changes that turn the recipe's objective into it, as `vary` takes them.
        dynamic_sampling, updates_per_batch: its two habits of the loop.
        differences: from the nearest recipe, each choice in a phrase.
        beyond: choices that keel does not have.
        idle: knobs that were set and do nothing.
        unknown: keys that the framework does not know, with the nearest that it does.
        warnings: what is likely a mistake.
        named_after: the recipe whose name it carries, "" for none; departures: where it differs from that one.
    """

    framework: str
    version: str
    path: str
    recipe: str
    exact: bool
    objective: Objective
    overlay: Mapping[str, Any]
    dynamic_sampling: bool
    updates_per_batch: int
    differences: tuple[Difference, ...]
    beyond: tuple[Beyond, ...]
    idle: tuple[Idle, ...]
    unknown: tuple[Unknown, ...]
    warnings: tuple[str, ...]
    named_after: str
    departures: tuple[Difference, ...]

    def text(self) -> str:
        """The translation in plain words."""
        paper = recipe(self.named_after).paper if self.named_after else ""
        sections = [
            ("Not among keel's choices", [f"{item.knob}: {item.says}" for item in self.beyond]),
            ("Does nothing here", [f"{item.knob}: {_value(item.value)} ({item.because})" for item in self.idle]),
            ("Unknown to " + self.framework, [item.text() for item in self.unknown]),
            ("Look again", list(self.warnings)),
            (f"Departs from {self.named_after}, {paper}", [_departure(item) for item in self.departures]),
        ]
        return "\n".join([self._headline(), *(line for title, lines in sections for line in _section(title, lines))])

    def as_json(self) -> dict[str, Any]:
        """The stable record of `keel audit --translate … --json`."""
        return {
            "framework": self.framework,
            "version": self.version,
            "path": self.path,
            "recipe": self.recipe,
            "exact": self.exact,
            "overlay": {path: _plain(value) for path, value in self.overlay.items()},
            "dynamic_sampling": self.dynamic_sampling,
            "updates_per_batch": self.updates_per_batch,
            "beyond": [{"knob": item.knob, "says": item.says} for item in self.beyond],
            "idle": [{"knob": item.knob, "value": _plain(item.value), "because": item.because} for item in self.idle],
            "unknown": [{"key": item.key, "nearest": item.nearest} for item in self.unknown],
            "warnings": list(self.warnings),
            "named_after": self.named_after,
            "departures": [{"field": d.field, "paper": d.a, "here": d.b, "source": d.source_a} for d in self.departures],
        }

    def _headline(self) -> str:
        of = f"{self.path}, with the defaults of {self.framework} {self.version}"
        if self.exact:
            return f"{of}, is keel's {self.recipe}."
        own = recipe(self.recipe)
        habits = {"dynamic_sampling": self.dynamic_sampling, "updates_per_batch": self.updates_per_batch}
        changes = {**self.overlay, **{name: value for name, value in habits.items() if getattr(own, name) != value}}
        lines = "".join(f"\n  {as_text({path: value})}" for path, value in changes.items())
        if not changes:
            return f"{of}, is keel's {self.recipe}, but for what keel has no choice for."
        return f"{of}, is nearest to keel's {self.recipe}, with{lines}"


def translate(framework: str, path: str | Path) -> Translation:
    """What a configuration file is, in keel's words; the framework need not be installed.

    Args:
        framework: "trl", a GRPOConfig as YAML; or "verl", its trainer's nested YAML, whole or in part.
        path: of the file.

    Raises:
        KeelError: an unknown framework, an unreadable file, or a value that the framework would refuse.
    """
    if framework not in READERS:
        raise KeelError(
            f"No configurations of {framework!r} are known; {nearest(framework, READERS)}Expected one of: {', '.join(READERS)}."
        )
    read, version = READERS[framework]
    given, unknown, remarks = read_file(framework, Path(path))
    reading = read(given)
    own = as_recipe(reading)
    closest = nearest_recipe(own, prefer=reading.named_after)
    apart = difference(closest, own)
    return Translation(
        framework=framework,
        version=version,
        path=str(path),
        recipe=closest.name,
        exact=not apart and not reading.beyond,
        objective=reading.objective,
        overlay=overlay(closest.objective, reading.objective),
        dynamic_sampling=reading.dynamic_sampling,
        updates_per_batch=reading.updates_per_batch,
        differences=tuple(apart),
        beyond=reading.beyond,
        idle=reading.idle,
        unknown=unknown,
        warnings=(*remarks, *reading.warnings),
        named_after=reading.named_after,
        departures=tuple(difference(reading.named_after, own)) if reading.named_after else (),
    )


def as_recipe(reading: Reading) -> Recipe:
    """A reading as a recipe without a paper."""
    habits = dict(dynamic_sampling=reading.dynamic_sampling, updates_per_batch=reading.updates_per_batch)
    return Recipe("configuration", "As configured", reading.objective, **habits)


def nearest_recipe(own: Recipe, prefer: str = "", among: Iterable[Recipe] | None = None) -> Recipe:
    """The recipe that differs in the fewest choices; a number or a habit of the loop counts a quarter of a part.

    Args:
        prefer: taken where several are equally near.
    """
    known = list(RECIPES.values() if among is None else among)
    return min(known, key=lambda one: (_distance(one, own), one.name != prefer))


def _distance(a: Recipe, b: Recipe) -> float:
    of_a, of_b = choices(a), choices(b)
    apart = [(name, of_a.get(name, ""), of_b.get(name, "")) for name in {*of_a, *of_b} if of_a.get(name, "") != of_b.get(name, "")]
    habits = ("dynamic_sampling", "updates_per_batch", "entropy_coef")
    return math.fsum(0.25 if name in habits or one.split("(")[0] == other.split("(")[0] else 1.0 for name, one, other in apart)


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _departure(item: Difference) -> str:
    source = f" ({item.source_a})" if item.source_a else ""
    return f"{item.field}: {item.b}; there {item.a}{source}"


def _value(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if isinstance(value, bool | None) else f"{value}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else getattr(value, "__name__", str(value))
