"""Rubrics: the sum, and what is said about one that cannot be."""

import pytest

from keel.errors import KeelError
from keel.rewards.rubric import load_rubric

PROOF = """
name = "proof"
pass_at = 0.8

[[criteria]]
name = "result"
kind = "essential"
says = "It ends with the result."

[[criteria]]
name = "steps"
says = "Every step follows."
weight = 0.6
levels = [0, 0.5, 1]

[[criteria]]
name = "tidy"
kind = "optional"
says = "It is easy to read."

[[criteria]]
name = "guess"
kind = "pitfall"
says = "The result is guessed."
"""


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "proof.toml"
    path.write_text(PROOF)
    return load_rubric(path)


@pytest.mark.parametrize(
    ("earned", "value", "correct"),
    [  # positive weights 1 + .6 + .3 = 1.9; the pitfall takes .9
        ((1, 1, 1, 0), 1.0, True),
        ((1, 1, 0, 0), 1.6 / 1.9, True),
        ((1, 0.5, 0, 0), 1.3 / 1.9, False),
        ((0, 1, 1, 0), 0.9 / 1.9, False),
        ((1, 1, 1, 1), 1.0 / 1.9, False),
        ((0, 0, 0, 1), 0.0, False),
        ((0, 0, 0, 0), 0.0, False),
    ],
)
def test_score(rubric, earned, value, correct):
    names = ("result", "steps", "tidy", "guess")
    score = rubric.score(dict(zip(names, map(float, earned), strict=True)))
    assert score.value == pytest.approx(value) and score.correct is correct
    assert score.parts == {f"point.{name}": share for name, share in zip(names, earned, strict=True)}


def test_what_was_earned_has_to_fit(rubric):
    for earned in ({}, {"result": 1.0}, {"result": 1.0, "steps": 2.0, "tidy": 0.0, "guess": 0.0}):
        with pytest.raises(KeelError, match="share"):
            rubric.score(earned)


def test_the_hash_follows_everything_that_can_change_a_verdict(rubric):
    seen = {rubric.hash}
    for old, new in (("0.6", "0.5"), ("guessed", "made up"), ("0.8", "0.9"), ('"proof"', '"other"'), ("[0, 0.5, 1]", "[0, 1]")):
        import tomllib

        seen.add(load_rubric(tomllib.loads(PROOF.replace(old, new))).hash)
    assert len(seen) == 6 and load_rubric(tomllib.loads(PROOF)).hash == rubric.hash


ONE = {"name": "a", "says": "It is so."}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "lacks 'criteria'"),
        ({"criteria": []}, "criteria of the rubric"),
        ({"criteria": "a"}, "criterion 1 is 'a'"),
        ({"criteria": [{"name": "a"}]}, "criterion 1 lacks 'says'"),
        ({"criteria": [ONE, {"name": "b", "say": "x", "says": "y"}]}, "criterion 2 has no setting 'say': did you mean 'says'"),
        ({"criteria": [ONE], "pasat": 1}, "has no setting 'pasat': did you mean 'pass_at'"),
        ({"criteria": [ONE], "pass_at": 2}, "pass_at of the rubric is 2"),
        ({"criteria": [ONE | {"kind": "esential"}]}, "kind of criterion 1 is 'esential'.*essential or important"),
        ({"criteria": [ONE | {"weight": -1}]}, "above 0"),
        ({"criteria": [ONE | {"weight": 0}]}, "above 0"),
        ({"criteria": [ONE | {"weight": float("nan")}]}, "weight of criterion 1"),
        ({"criteria": [ONE | {"kind": "pitfall", "weight": 1}]}, "below 0"),
        ({"criteria": [ONE | {"kind": "pitfall"}]}, "only pitfalls"),
        ({"criteria": [ONE, ONE]}, "two criteria named 'a'"),
        ({"criteria": [ONE | {"name": "a b"}]}, "letters, digits"),
        ({"criteria": [ONE | {"levels": [0, 2]}]}, "rising list from 0 to 1"),
        ({"criteria": [ONE | {"levels": [1, 0]}]}, "rising list from 0 to 1"),
        ({"criteria": [{}, {}]}, "more to mend"),
    ],
)
def test_a_rubric_that_cannot_be_says_why(table, said):
    with pytest.raises(KeelError, match=said):
        load_rubric(table)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(KeelError, match="no file"):
        load_rubric(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[[criteria]")
    with pytest.raises(KeelError, match="not TOML"):
        load_rubric(tmp_path / "bad.toml")
