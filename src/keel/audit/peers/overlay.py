"""The changes, by dotted path as `vary` takes them, that turn one objective into another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from keel.objectives.objective import Objective
from keel.objectives.parts import PARTS


def overlay(a: Objective, b: Objective) -> dict[str, Any]:
    """What to change in `a` to get `b`: names and numbers, as a configuration file would write them.

    A part that has no name stands for itself; `vary(a, overlay(a, b)) == b` in either case.
    """
    changes: dict[str, Any] = {}
    for item in fields(Objective):
        changes |= _changes(item.name, item.name, getattr(a, item.name), getattr(b, item.name))
    return changes


def _changes(path: str, kind: str, a: Any, b: Any) -> dict[str, Any]:
    if a == b:
        return {}
    if isinstance(b, tuple):
        return _member_changes(path, kind, a, b)
    if type(a) is type(b) and is_dataclass(b) and not isinstance(b, type):
        return _setting_changes(path, a, b)
    if kind not in PARTS:
        return {path: b}
    start, name = _start(kind, b)
    return {path: name} | (_setting_changes(path, start, b) if start != b else {})


def _setting_changes(path: str, a: Any, b: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for item in fields(b):
        changes |= _changes(f"{path}.{item.name}", item.name, getattr(a, item.name), getattr(b, item.name))
    return changes


def _member_changes(path: str, kind: str, a: tuple, b: tuple) -> dict[str, Any]:
    if [type(member) for member in a] == [type(member) for member in b]:
        changes: dict[str, Any] = {}
        old = a
    else:
        changes = {path: [_start(kind, member)[1] for member in b]}
        old = tuple(_start(kind, member)[0] for member in b)
    for before, after in zip(old, b, strict=True):
        changes |= _setting_changes(f"{path}.{_start(kind, after)[1]}", before, after) if before != after else {}
    return changes


def _start(kind: str, part: Any) -> tuple[Any, Any]:
    """The named part that `part` is a variation of, with that name; `part` twice where there is none."""
    known = {name: _made(entry) for name, entry in PARTS[kind].items()}
    for name, entry in known.items():
        if entry == part:
            return entry, name
    same = [(name, entry) for name, entry in known.items() if type(entry) is type(part) and is_dataclass(part)]
    if not same:
        return part, part
    return min(((entry, name) for name, entry in same), key=lambda found: len(_setting_changes("", found[0], part)))


def _made(entry: Any) -> Any:
    if not isinstance(entry, type):
        return entry
    required = [item for item in fields(entry) if item.default is MISSING and item.default_factory is MISSING]
    return entry if required else entry()


def as_text(changes: Mapping[str, Any]) -> str:
    """Changes in one line, as they are typed after a recipe's name."""
    return ", ".join(f"{path} = {_word(value)}" for path, value in changes.items()) or "none"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_word, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else getattr(value, "__name__", None) or str(value)
