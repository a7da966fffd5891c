"""Where an answer is found in a completion, and when it is right."""

from __future__ import annotations

import time

import pytest

from keel.rewards.exact import after_marker, answer_in, exact, exact_anywhere, in_tag, last_line, last_number
from keel.types import Prompt

MARKER = after_marker("A:")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("A:37", "37"),
        ("12+5=17\n17+20=37\nA:37", "37"),
        ("A: 37 \n", "37"),
        ("A:36\nA:37", "37"),  # the last one counts
        ("A:37\nA:36", "36"),
        ("A:37\n36", "37\n36"),  # what follows belongs to the answer, so guesses cannot be listed
        ("A:", ""),
        ("37", None),
        ("so A:37", None),  # not at the beginning of a line
        ("a:37", None),
    ],
)
def test_marker(text, answer):
    assert MARKER(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 42.", "42"),
        ("17 + 25 = 42", "42"),
        ("17+25=42", "42"),
        ("5-3", "3"),  # a minus between numbers is no sign
        ("5 - -3", "-3"),
        ("it is -1,234.50.", "-1234.50"),
        ("−7", "-7"),  # a typographic minus
        ("+7", "7"),
        ("1,2,3", "3"),
        ("12,345", "12345"),
        ("$42", "42"),
        ("forty-two", None),
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert last_number(text) == answer


def test_last_line_and_tag():
    assert last_line("first\n\n last \n\n") == "last"
    assert last_line("\n \n") is None
    assert in_tag("<answer>1</answer> or <answer> 2 </answer>") == "2"
    assert in_tag("<answer>1") is None


@pytest.mark.parametrize(
    "text, gold, answer",
    [
        ("I think <answer>7</answer>, not 8", "8", "7"),
        ("the sum of 3 and 4 is 7.", "7", "7"),
        ("it flows\nParis", "Paris", "Paris"),
        ("1 2\n3 4", "1 2\n3 4", "1 2\n3 4"),
    ],
)
def test_answer_in_looks_at_the_kind_of_gold(text, gold, answer):
    assert answer_in(text, gold) == answer


def test_exact_is_equality_and_nothing_else():
    grade = exact(MARKER)
    prompt = Prompt("p", "", "7")
    assert (grade(prompt, "A:7").value, grade(prompt, "A:7").correct) == (1.0, True)
    for wrong in ("A:07", "A:7.0", "A:77", "A:7 7", "7", "A:"):
        assert (grade(prompt, wrong).value, grade(prompt, wrong).correct) == (0.0, False), wrong
    assert grade(prompt, "7").reason == "no answer found"


@pytest.mark.parametrize("piece", ["9", "1,", "A:", "\n", " ", "-", "<answer>", "\n1", "9.", "\U0001f600"])
@pytest.mark.parametrize("extract", [MARKER, last_number, last_line, in_tag])
def test_a_million_characters_take_no_time(extract, piece):
    start = time.perf_counter()
    extract(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 0.5


def test_exact_anywhere_grades_by_gold():
    assert exact_anywhere(Prompt("p", "", "Paris"), "It is\nParis").correct
    assert not exact_anywhere(Prompt("p", "", "12"), "12 or 13").correct


def test_what_was_taken_for_the_answer_is_said():
    grade = exact(last_number)
    assert grade(Prompt("p", "", "42"), "first 41, no: 43").said == "43"
    assert grade(Prompt("p", "", "42"), "none").said == ""
    assert grade(Prompt("p", "", "42"), "0042") == grade(Prompt("p", "", "42"), "43")  # the verdict alone is compared
