"""Recipes laid side by side: what two of them choose differently, and where each paper says so. Makes
docs/papers.md."""

from __future__ import annotations

from dataclasses import dataclass, fields

from keel.objectives.advantages import Advantage
from keel.objectives.parts import describe
from keel.objectives.recipes import RECIPES, Recipe, recipe


@dataclass(frozen=True)
class Difference:
    """One choice in which two recipes differ.

    Args:
        field: the choice, as `vary` and configuration files name it.
        a, b: what each chooses.
        source_a, source_b: where its paper or code says so; "" where it is as in `solid`.
    """

    field: str
    a: str
    b: str
    source_a: str
    source_b: str


def choices(recipe: Recipe) -> dict[str, str]:
    """Every choice of a recipe by its name, in one phrase each."""
    parts = {item.name: getattr(recipe.objective, item.name) for item in fields(recipe.objective)}
    advantage = parts.pop("advantage")
    if isinstance(advantage, Advantage):
        parts = {"advantage.baseline": advantage.baseline, "advantage.scale": advantage.scale, **parts}
    else:
        parts = {"advantage": advantage, **parts}
    parts |= {"dynamic_sampling": recipe.dynamic_sampling, "updates_per_batch": recipe.updates_per_batch}
    return {name: describe(part) for name, part in parts.items()}


def difference(a: Recipe | str, b: Recipe | str) -> list[Difference]:
    """The choices in which two recipes differ, in the order of the loss."""
    a, b = (recipe(r) if isinstance(r, str) else r for r in (a, b))
    of_a, of_b = choices(a), choices(b)
    names = list(dict.fromkeys([*of_a, *of_b]))
    return [
        Difference(name, of_a.get(name, "none"), of_b.get(name, "none"), a.sources.get(name, ""), b.sources.get(name, ""))
        for name in names
        if of_a.get(name, "none") != of_b.get(name, "none")
    ]


def papers_markdown() -> str:
    """docs/papers.md: every recipe, and each choice in which it differs from `solid`, with its source."""
    head = (
        "# Recipes and their papers\n\n"
        "Generated from `src/keel/objectives/recipes.py`; do not edit. Each table lists the choices that differ from\n"
        "`solid`, with the place in the paper or its code, as we read it: look again before quoting it to anyone.\n"
        "`keel papers dapo grpo` compares any two.\n"
    )
    return "\n".join([head, _choices_table(RECIPES["solid"]), *(_section(r) for r in RECIPES.values() if r.name != "solid")])


def _section(of: Recipe) -> str:
    return "\n".join([*_title(of), *_table(("choice", "here", "source"), _rows(of)), "", *_notes(of)])


def _choices_table(of: Recipe) -> str:
    rows = [(f"`{name}`", f"`{choice}`", of.sources.get(name, "")) for name, choice in choices(of).items()]
    return "\n".join([*_title(of), *_table(("choice", "here", "source"), rows), "", *_notes(of)])


def _rows(of: Recipe) -> list[tuple[str, str, str]]:
    return [(f"`{d.field}`", f"`{d.b}`", d.source_b) for d in difference("solid", of)]


def _title(of: Recipe) -> list[str]:
    return [f"## {of.name}", "", f"{of.title}. [{of.paper}]({of.url})" if of.url else f"{of.title}.", ""]


def _notes(of: Recipe) -> list[str]:
    return [of.notes, ""] if of.notes else []


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
