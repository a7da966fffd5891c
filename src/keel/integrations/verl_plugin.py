"""Registers every recipe that verl can hold with verl, when verl imports it: its entry point, or VERL_USE_EXTERNAL_MODULES."""

from __future__ import annotations

from keel.integrations.verl import beyond, register
from keel.objectives.recipes import RECIPES

NAMES = tuple(register(recipe) for recipe in RECIPES.values() if not beyond(recipe.objective))
