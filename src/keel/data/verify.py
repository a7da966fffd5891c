"""Gold answers worked out once more from the text of the question alone, by other code than that which wrote them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from keel.tasks.task import Task
from keel.types import Prompt

Verdict = Literal["recomputed", "graded", "wrong", "ungradable", "lax"]
_SUM = re.compile(r"Q:(\d+(?:[+-]\d+)+)=\s*")
_TWO = re.compile(
    r"(?:Calculate (\d+) \+ (\d+)\.|What is (\d+) \+ (\d+)\?|Add (\d+) to (\d+)\.|There are (\d+) apples in one box and (\d+) in "
    r"another\. How many are there together\?) Write only the (?:result|number)\."
)


def _sum(text: str) -> str | None:
    found = _SUM.fullmatch(text)
    return str(sum(int(term) for term in re.findall(r"[+-]?\d+", found[1]))) if found else None


def _letters(mark: str, change: Callable[[str], str]) -> Callable[[str], str | None]:
    return lambda text: change(text[len(mark) :].strip()) if text.startswith(mark) else None


def _two_numbers(text: str) -> str | None:
    found = _TWO.fullmatch(text)
    return str(sum(int(number) for number in found.groups() if number)) if found else None


SOLVERS: tuple[Callable[[str], str | None], ...] = (
    _sum,
    _letters("S:", lambda text: "".join(sorted(text))),
    _letters("R:", lambda text: text[::-1]),
    _letters("M:", lambda text: str(max(map(int, text.split(","))))),
    _two_numbers,
)


def solve(text: str) -> str | None:
    """The answer, where one of the solvers understands the question."""
    return next((answer for solver in SOLVERS if (answer := solver(text)) is not None), None)


def verify(task: Task, prompt: Prompt, other: Prompt) -> Verdict:
    """How sure a gold answer is.

    "recomputed": a solver finds the same, and the reward gives it 1. "graded": no solver knows, but the reward gives it 1.
    "wrong": a solver finds another one. "ungradable": the reward does not give it 1. "lax": the reward gives something to the
    empty completion, or to another prompt's other answer.
    """
    answer = solve(prompt.text)
    if answer is not None and answer != prompt.answer:
        return "wrong"
    score = task.reward(prompt, task.gold(prompt), "stop")
    if not score.correct or score.value is None or abs(score.value - 1) > 1e-9:
        return "ungradable"
    if task.reward(prompt, "", "stop").correct:
        return "lax"
    if other.answer != prompt.answer and task.reward(prompt, task.gold(other), "stop").correct:
        return "lax"
    return "graded" if answer is None else "recomputed"
