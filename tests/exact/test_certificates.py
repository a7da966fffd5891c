"""Every claim that a recipe or an estimator makes, recomputed by enumeration; and that a false one would not pass."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from runpy import run_path

import pytest

from keel.audit.certificate import certify, judge
from keel.audit.facts import facts
from keel.audit.identify import identify
from keel.errors import KeelError
from keel.objectives.estimators import ESTIMATORS
from keel.objectives.objective import Objective
from keel.objectives.parts import PARTS
from keel.objectives.recipes import RECIPES, recipe
from keel.types import Claim

pytestmark = pytest.mark.usefixtures("one_thread")
SUBJECTS = [*RECIPES.values(), *ESTIMATORS.values()]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_claim_holds(subject):
    for certificate in certify(subject):
        assert certificate.holds, certificate


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_claim_holds_in_other_worlds(subject):
    for certificate in certify(subject, seed=100):
        assert certificate.holds or certificate.claim.says == "biased", certificate


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: f"{fact.about}: {fact.says}")
def test_every_number_is_as_stated(fact):
    assert fact.holds, fact


def parts_of(value):
    """Every function and class that an objective is put together from."""
    if isinstance(value, tuple):
        for item in value:
            yield from parts_of(item)
    elif is_dataclass(value):
        yield type(value)
        for item in fields(value):
            yield from parts_of(getattr(value, item.name))
    elif callable(value):
        yield value


@pytest.mark.parametrize(
    "field", ["baseline", "scale", "log_ratio", "surrogate", "corrections", "estimator", "level", "aggregate", "shaping"]
)
def test_a_part_that_nobody_makes_a_claim_about_fails(field):
    claimed = {part for subject in SUBJECTS for part in parts_of(subject.objective)}
    assert set(PARTS[field].values()) <= claimed


def test_a_recipe_without_claims_is_refused():
    with pytest.raises(KeelError, match="makes no claim"):
        certify(replace(recipe("solid"), name="silent", claims=()))


@pytest.mark.parametrize(
    "objective, claim",
    [
        (recipe("grpo").objective, Claim("unbiased", "J")),
        (recipe("dr_grpo").objective, Claim("unbiased", "J")),
        (recipe("solid").objective, Claim("scaled", "J", factor="(G-1)/G")),
        (recipe("solid").objective, Claim("biased", "J")),
        (recipe("solid").objective, Claim("zero")),
        (recipe("solid").objective, Claim("scaled", "-J")),
        (ESTIMATORS["k3_in_loss"].objective, Claim("unbiased", "-reverse_kl", {"reward": "zero"})),
        (ESTIMATORS["k1_in_loss"].objective, Claim("biased", "0", {"reward": "zero"})),
        (recipe("rloo").objective, Claim("unbiased", "J - 0.06 reverse_kl")),
        (recipe("grpo").objective, Claim("mixture", "J + reverse_kl")),
    ],
)
def test_a_false_claim_does_not_pass(objective, claim):
    assert not judge("false", objective, claim).holds


@pytest.mark.parametrize(
    "claim, match",
    [
        (Claim("unbiased", "K"), "is no truth"),
        (Claim("unbiased", "J", {"drfit": 0.1}), "did you mean 'drift'"),
        (Claim("scaled", "J", factor="G/(G-1)"), "No factor is named"),
    ],
)
def test_a_claim_that_cannot_be_read_is_refused(claim, match):
    with pytest.raises(KeelError, match=match):
        judge("odd", Objective(), claim)


@pytest.mark.parametrize(
    "name, terms",
    [
        ("solid", {"J": 1.0}),
        ("rloo", {"J": 1.0, "reverse_kl": -0.05}),
        ("dr_grpo", {"J": 0.75}),
        ("k3_in_loss", {"forward_kl_positions": -1.0}),
        ("k3_in_reward", {"reverse_kl": -1.0, "forward_kl_positions": 1.0}),
        ("k1_in_loss", {}),
        ("group_std", {"J_group_std": 1.0}),
    ],
)
def test_the_truth_is_identified_with_its_coefficients(name, terms):
    subject = RECIPES.get(name) or ESTIMATORS[name]
    found = identify(subject.objective, {"reward": "zero"} if name.startswith("k") else {})
    assert found.exact
    assert {truth: coefficient for coefficient, truth in found.terms} == pytest.approx(terms)


def test_what_follows_no_truth_is_said_to():
    found = identify(recipe("grpo").objective)
    assert not found.exact and found.residual > 0.05 and "none of these" in found.text()


def test_the_page_of_claims_is_current():
    docs = Path(__file__).parents[2] / "docs"
    pages = run_path(str(docs / "generate.py"))["PAGES"]
    assert (docs / "claims.md").read_text(encoding="utf-8") == pages["claims.md"](), "run: make docs"
