"""Completions that somebody sampled, put to the items that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.data.items import Item
from keel.data.near import normalised
from keel.errors import KeelError
from keel.types import Finish, row_of

IDS = ("prompt_id", "id")
TEXTS = ("completion", "response", "output", "prediction", "text", "completions", "responses", "samples")


@dataclass(frozen=True)
class Sampled:
    """One completion."""

    text: str
    finish: Finish = "stop"


@dataclass(frozen=True)
class Samples:
    """Completions by the id of the item that they answer.

    Args:
        unmatched: completions of no item here.
    """

    name: str
    of: Mapping[str, tuple[Sampled, ...]]
    unmatched: int

    @property
    def count(self) -> int:
        return sum(map(len, self.of.values()))


def read_samples(path: str | Path, items: Sequence[Item]) -> Samples:
    """The completions of a run folder, or of a JSONL with one completion (or a list of them) a line.

    A line belongs to the item whose id it has, if its prompt is that item's too; else to the item with its prompt.

    Raises:
        KeelError: no such file, no completions in it, or none that belongs to an item.
    """
    from keel.tasks.table import read_jsonl

    file = Path(path).expanduser()
    file = file / "rollouts.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise KeelError(f"There are no samples at {str(file)!r}. Expected a run folder, or a JSONL with a completion a line.")
    return match(read_jsonl(file), items, str(path))


def match(rows: Sequence[Mapping[str, Any]], items: Sequence[Item], name: str = "samples") -> Samples:
    """Completions of rows that are at hand."""
    by_id = {item.id: item for item in items}
    by_text = {normalised(item.prompt.text): item for item in reversed(items)}
    found: dict[str, list[Sampled]] = {}
    unmatched = 0
    for row in rows:
        completions = _completions(row)
        item = _item(row, by_id, by_text)
        if item is None:
            unmatched += len(completions)
        else:
            found.setdefault(item.id, []).extend(completions)
    if not found:
        raise KeelError(
            f"None of {unmatched} completions of {name!r} belongs to one of {len(items)} items. Expected lines with the items' ids "
            "(prompt_id) or their very prompts: were they sampled on other data, or with another suffix?"
        )
    return Samples(name, {id: tuple(completions) for id, completions in found.items()}, unmatched)


def _item(row: Mapping[str, Any], by_id: Mapping[str, Item], by_text: Mapping[str, Item]) -> Item | None:
    id = next((str(row[name]) for name in IDS if name in row), "")
    item = by_id.get(id) or by_id.get(row_of(id))
    asked = row.get("prompt", row.get("question"))
    if not isinstance(asked, str):
        return item
    asked = normalised(asked)
    return item if item is not None and normalised(item.prompt.text) == asked else by_text.get(asked)


def _completions(row: Mapping[str, Any]) -> list[Sampled]:
    name = next((name for name in TEXTS if name in row), None)
    if name is None:
        raise KeelError(f"A line of the samples has {', '.join(row)}. Expected a completion in one of: {', '.join(TEXTS)}.")
    texts = row[name] if isinstance(row[name], list) else [row[name]]
    finish = row.get("finish", "stop")
    return [Sampled(text if isinstance(text, str) else "", finish if finish in ("length", "error") else "stop") for text in texts]
