"""Recipes as data: names, sources, differences, variations; and what does not construct."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from keel.errors import KeelError
from keel.objectives import registry
from keel.objectives.corrections import MaskToken, TruncateToken, Veto
from keel.objectives.kl import LossKL, k3
from keel.objectives.log_ratios import geometric_mean
from keel.objectives.objective import Objective
from keel.objectives.papers import choices, difference, papers_markdown
from keel.objectives.parts import PARTS, describe, part, register_part, vary
from keel.objectives.recipes import RECIPES, Recipe, recipe, register
from keel.objectives.surrogates import Clip, Gmpo, MiniRL, Reinforce, Surrogate

SOLID = recipe("solid").objective


@pytest.fixture
def registered(monkeypatch):
    """A test may register what it likes; it is gone afterwards."""
    monkeypatch.setattr(registry, "RECIPES", dict(RECIPES))
    for field in PARTS:
        monkeypatch.setitem(PARTS, field, dict(PARTS[field]))


def test_every_recipe_of_the_field_is_there():
    first = "solid grpo dapo dr_grpo rloo reinforce_pp reinforce_pp_baseline lite_ppo minirl gspo gmpo cispo sapo"
    assert {*first.split(), "tis", "icepop", "deepseek_v32", "decoupled"} <= set(RECIPES)


@pytest.mark.parametrize("found", RECIPES.values(), ids=RECIPES)
def test_every_choice_that_differs_from_solid_has_its_source(found):
    assert found.paper and re.match(r"https://", found.url)
    assert set(found.sources) <= set(choices(found))
    for differing in difference("solid", found):
        assert differing.source_b, f"{found.name} does not say where {differing.field} is from"


def test_dapo_against_grpo():
    rows = {d.field: (d.a, d.b) for d in difference("dapo", "grpo")}
    assert set(rows) == {"surrogate", "loss_kl", "aggregate", "shaping", "dynamic_sampling", "updates_per_batch"}
    assert rows["surrogate"] == ("Clip(clip_low=0.2, clip_high=0.28)", "Clip(clip_low=0.2, clip_high=0.2)")
    assert difference("grpo", "grpo") == []


def test_solid_uses_no_trick():
    assert describe(SOLID.surrogate) == "Reinforce()"
    assert (SOLID.corrections, SOLID.reward_kl, SOLID.loss_kl, SOLID.shaping, SOLID.entropy_coef) == (
        (),
        None,
        None,
        (),
        0.0,
    )
    assert SOLID.needs == frozenset()
    assert recipe("solid").updates_per_batch == 1 and not recipe("solid").dynamic_sampling


def test_needs():
    assert recipe("grpo").objective.needs == {"logp_ref"}
    assert recipe("rloo").objective.needs == {"logp_ref", "logp_old"}
    assert recipe("icepop").objective.needs == frozenset()
    assert replace(SOLID, corrections=(MaskToken(leaves=True),)).needs == {"logp_old"}
    assert replace(SOLID, entropy_coef=0.01).needs == {"entropy"}


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(KeelError, match="did you mean 'grpo'"):
        recipe("grop")


def test_a_recipe_of_your_own(registered, monkeypatch):
    mine = replace(recipe("dapo"), name="mine", dynamic_sampling=False)
    assert register(mine) is mine and recipe("mine") is mine
    assert register(mine) is mine  # twice the same is no quarrel
    with pytest.raises(KeelError, match="mine"):
        register(replace(mine, updates_per_batch=2))
    module = types.ModuleType("my_recipes")
    module.other = replace(mine, name="other")
    monkeypatch.setitem(sys.modules, "my_recipes", module)
    assert recipe("my_recipes:other") is module.other
    with pytest.raises(KeelError, match="no_such"):
        recipe("my_recipes:no_such")


@pytest.mark.parametrize("changes", [{"updates_per_batch": 0}, {"name": "not a name"}])
def test_a_recipe_that_means_nothing(changes):
    with pytest.raises(KeelError, match="expected"):
        Recipe(**({"name": "x", "title": "x", "objective": SOLID} | changes))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"log_ratio": geometric_mean}, "Reinforce"),
        ({"surrogate": Gmpo(), "log_ratio": geometric_mean}, "Gmpo"),
        ({"surrogate": MiniRL(), "corrections": (TruncateToken(),)}, "twice"),
        ({"corrections": (TruncateToken(), MaskToken())}, "twice"),
        ({"entropy_coef": float("nan")}, "entropy_coef"),
    ],
)
def test_impossible_combinations_do_not_construct(changes, says):
    with pytest.raises(KeelError, match=says):
        replace(SOLID, **changes)


def test_possible_ones_do():
    Objective(surrogate=MiniRL(), corrections=(Veto(),))
    Objective(surrogate=Clip(), log_ratio=geometric_mean, corrections=(Veto(), TruncateToken()))


# ── variations by name ─────────────────────────────────────────────────────────────────────────────────────────────


def test_vary():
    changed = vary(
        recipe("dapo").objective,
        {
            "surrogate.clip_high": 0.3,
            "corrections": ["veto", "truncate_token"],
            "corrections.truncate_token.cap": 3.0,
            "loss_kl": "k3",
            "loss_kl.kl_coef": 0.5,
            "advantage.scale": "unscaled",
            "aggregate": "sequence_mean",
            "shaping": [],
        },
    )
    assert changed.surrogate == Clip(0.2, 0.3)
    assert changed.corrections == (Veto(), TruncateToken(3.0))
    assert changed.loss_kl == LossKL(0.5, k3)
    assert changed.shaping == () and changed.aggregate.__name__ == "sequence_mean"
    assert changed.advantage == recipe("dr_grpo").objective.advantage
    assert vary(changed, {"loss_kl": "none"}).loss_kl is None
    assert vary(SOLID, {}) == SOLID


@pytest.mark.parametrize(
    ("value", "expected"),
    [("veto", (Veto(),)), ("veto, truncate_token", (Veto(), TruncateToken())), (["veto"], (Veto(),)), (None, ()), ([], ())],
)
def test_several_parts_as_a_command_line_has_them(value, expected):
    assert vary(SOLID, {"corrections": value}).corrections == expected


@pytest.mark.parametrize(
    "changes, hint",
    [
        ({"surogate": "clip"}, "surrogate"),
        ({"surrogate": "clop"}, "clip"),
        ({"surrogate": "clip", "surrogate.clip_hihg": 0.3}, "clip_high"),
        ({"surrogate.clip_high": 0.3}, "no settings"),
        ({"corrections.veto.low": 0.1}, "Add it first"),
        ({"loss_kl.kl_coef": 0.1}, "no setting"),
        ({"loss_kl": "k3", "loss_kl.level": "per_sequnce"}, "per_sequence"),
        ({"surrogate": "clip", "surrogate.clip_high": -0.3}, "clip_high"),
    ],
)
def test_vary_refuses_and_helps(changes, hint):
    with pytest.raises(KeelError, match=hint):
        vary(SOLID, changes)


def test_every_part_has_a_name_and_constructs():
    for field, parts in PARTS.items():
        for name in parts:
            describe(part(field, name))


def test_a_part_of_your_own(registered):
    class Mine(Surrogate):
        def __call__(self, view):
            return -view.advantage * view.logp

    register_part("surrogate", "mine", Mine)
    assert type(vary(SOLID, {"surrogate": "mine"}).surrogate) is Mine
    with pytest.raises(KeelError, match="mine"):
        register_part("surrogate", "mine", Reinforce)
    with pytest.raises(KeelError, match="surrogate"):
        register_part("surogate", "mine", Mine)


# ── the generated page, and the house's form ───────────────────────────────────────────────────────────────────────


def test_papers_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "papers.md"
    assert page.read_text(encoding="utf-8") == papers_markdown(), "run: python docs/generate.py"


def test_every_part_cites_its_source():
    for field, parts in PARTS.items():
        for name, found in parts.items():
            if field in ("advantage", "reward_kl", "loss_kl") or found is None:
                continue
            text = " ".join(found.__doc__.split())
            assert "Source:" in text and "Differs from it:" in text, f"{field} {name}"
