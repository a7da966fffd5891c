"""The audit of everything that keel ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.audit.certificate import Certificate, certify
from keel.audit.facts import Fact, facts
from keel.audit.orders import Order, left_by_length, orders
from keel.objectives.estimators import FAMILIES
from keel.objectives.recipes import RECIPES


@dataclass(frozen=True)
class Audit:
    """Every certificate: those of claims by family, those of numbers, and the orders of error."""

    families: Mapping[str, Sequence[Certificate]]
    facts: Sequence[Fact]
    orders: Sequence[Order]
    shares: Mapping[int, Sequence[float]]

    @property
    def certificates(self) -> list[Certificate]:
        return [certificate for family in self.families.values() for certificate in family]

    @property
    def holds(self) -> bool:
        return all(c.holds for c in self.certificates) and all(f.holds for f in self.facts)

    def as_json(self) -> list[dict[str, Any]]:
        """The records of `keel audit --json`."""
        return [c.as_json() for c in self.certificates] + [f.as_json() for f in self.facts]


def audit_everything(knobs: Mapping[str, Any] | None = None, seed: int = 0) -> Audit:
    """Recipes first, then their parts, family by family; a few seconds.

    Args:
        knobs: of the world, under those that a claim fixes.
        seed: of the first random world.
    """
    everything = {"recipes": tuple(RECIPES.values()), **FAMILIES}
    families = {
        family: [certificate for recipe in members for certificate in certify(recipe, knobs, seed)]
        for family, members in everything.items()
    }
    return Audit(families, facts(), orders(), left_by_length())
