"""What a recipe is, and how one is made known and found."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from keel.errors import KeelError, nearest
from keel.objectives.objective import Objective
from keel.types import Claim


@dataclass(frozen=True)
class Recipe:
    """An objective, and the two habits of the loop that belong to it.

    Args:
        name: as users type it.
        title: one line.
        objective: the loss.
        dynamic_sampling: keep only groups with right and wrong answers, and sample on until the batch is full.
        updates_per_batch: optimizer steps per rollout batch; 1 is on-policy.
        paper: who and when.
        url: of the paper.
        sources: choice → where the paper or code makes it, for every choice that differs from `solid`.
        notes: what the recipe leaves out, and what it does not settle.
        claims: what its update is said to follow; `keel audit` checks each by enumeration.
    """

    name: str
    title: str
    objective: Objective
    dynamic_sampling: bool = False
    updates_per_batch: int = 1
    paper: str = ""
    url: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    claims: tuple[Claim, ...] = ()

    def __post_init__(self):
        if self.updates_per_batch < 1 or not self.name.isidentifier():
            raise KeelError(
                f"Recipe {self.name!r} with updates_per_batch={self.updates_per_batch}: expected a name of letters, "
                "digits and underscores, and at least one update per batch (1 is on-policy)."
            )


RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name, and give it back. A name that means another recipe already is refused."""
    if RECIPES.get(recipe.name, recipe) != recipe:
        raise KeelError(f"A recipe named {recipe.name!r} exists already and differs. Expected a new name; choose another one.")
    RECIPES[recipe.name] = recipe
    return recipe


def recipe(name: str) -> Recipe:
    """The recipe of that name; "package.module:name" imports that module first, which registers or holds it.

    Raises:
        KeelError: no such recipe; the nearest name is given.
    """
    module, _, name = name.rpartition(":")
    if module:
        held = getattr(importlib.import_module(module), name, None)
        if isinstance(held, Recipe):
            return register(held)
    if name not in RECIPES:
        known = ", ".join(sorted(RECIPES))
        hint = nearest(name, RECIPES)
        raise KeelError(
            f'No recipe is named {name!r}; {hint}Expected one of: {known}; or "package.module:name" for one of your '
            "own, which `keel.objectives.recipes.register` makes known."
        )
    return RECIPES[name]
