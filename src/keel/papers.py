"""`keel papers` in words: recipes, one recipe, or what two of them choose differently, with their papers' sources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from keel.errors import KeelError
from keel.objectives.papers import Difference, choices, difference, papers_markdown
from keel.objectives.recipes import RECIPES, Recipe, recipe


def told(names: Sequence[str], *, as_json: bool = False, as_markdown: bool = False) -> str:
    """What is asked for: all recipes without a name, one by its name, the difference of two.

    Raises:
        KeelError: more than two names, or one that is no recipe's.
    """
    if len(names) > 2:
        raise KeelError(f"keel papers was given {len(names)} recipes. Expected none, one or two to compare.")
    if as_markdown:
        return papers_markdown()
    if len(names) == 2:
        found = difference(*names)
        return _json(map(vars, found)) if as_json else _difference(found, *names)
    asked = [recipe(name) for name in names] or RECIPES.values()
    if as_json:
        return _json(map(_plain, asked))
    return "".join(map(_one, asked)) if names else _list()


def _plain(one: Recipe) -> dict[str, Any]:
    about = {name: getattr(one, name) for name in ("name", "title", "paper", "url", "notes")}
    return about | {"choices": choices(one), "sources": dict(one.sources)}


def _json(rows: Iterable[Any]) -> str:
    return f"{json.dumps(list(rows), ensure_ascii=False)}\n"


def _list() -> str:
    width = max(map(len, RECIPES))
    return "".join(f"{each.name:<{width}}  {each.title}  [{each.paper}]\n" for each in RECIPES.values())


def _one(one: Recipe) -> str:
    lines = [one.title, f"{one.paper}  {one.url}", ""]
    for name, here in choices(one).items():
        lines += [f"{name:<19} {here}", *([f"{'':<19} └ {source}"] if (source := one.sources.get(name)) else [])]
    return "\n".join([*lines, *(["", one.notes] if one.notes else [])]) + "\n"


def _difference(found: Sequence[Difference], a: str, b: str) -> str:
    width, lines = max(len(a), len(b)), []
    for each in found:
        lines.append(each.field)
        for name, choice, source in ((a, each.a, each.source_a), (b, each.b, each.source_b)):
            lines += [f"  {name:<{width}}  {choice}", *([f"  {'':<{width}}  └ {source}"] if source else [])]
    return "\n".join(lines or [f"{a} and {b} choose the same."]) + "\n"
