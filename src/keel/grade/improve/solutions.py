"""Sums worked step by step: what is true of a solution, computed; and ways of writing a wrong one.

"17+13=30⏎30+8=38⏎A:38" solves 17+13+8. A solution of which every step is right has level 1; one whose method is right and that
slips once, and carries the slip on, has level ½; anything else has level 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from keel.models.corpus import slip
from keel.tasks.problems import running_totals

_STEP = re.compile(r"(\d{1,4})\+(\d{1,4})=(\d{1,4})", re.ASCII)
_ANSWER = re.compile(r"A:(\d{1,4})", re.ASCII)
LEVELS = (0.0, 0.5, 1.0)
Parts = tuple[int, ...]


@dataclass(frozen=True)
class Truth:
    """What is true of a solution.

    Args:
        level: 1, ½ or 0.
        step: number of the first line that is wrong, from 1; 0 where none is. A line that is missing is the one after the last.
    """

    level: float
    step: int


def truth(parts: Parts, text: str) -> Truth:
    """Judge a solution by arithmetic."""
    lines, total, slips, first = text.split("\n"), parts[0], 0, 0
    for number, term in enumerate(parts[1:], start=1):
        found = _STEP.fullmatch(lines[number - 1]) if number <= len(lines) else None
        if found is None or (int(found[1]), int(found[2])) != (total, term):
            return Truth(0.0, first or number)
        if int(found[3]) != total + term:
            slips, first = slips + 1, first or number
        total = int(found[3])
    last = len(parts)
    found = _ANSWER.fullmatch(lines[last - 1]) if len(lines) == last else None
    if found is None or int(found[1]) != total:
        return Truth(0.0, first or min(last, len(lines) + 1))
    return Truth((1.0, 0.5, 0.0)[min(slips, 2)], first)


def worked(parts: Parts, results: list[int] | None = None, answer: int | None = None) -> str:
    """The steps with these results (the right ones unless given), each carried on, and the answer (the last result)."""
    results = results or running_totals(parts)
    totals = [parts[0], *results]
    steps = [f"{before}+{term}={after}" for before, term, after in zip(totals, parts[1:], totals[1:], strict=False)]
    return "\n".join([*steps, f"A:{results[-1] if answer is None else answer}"])


def _slipped(parts: Parts, rng: random.Random, times: int, near: bool) -> str:
    """Right but for `times` wrong results, each carried on: near misses, or any number of as many digits."""
    wrong = set(rng.sample(range(len(parts) - 1), times))
    results, total = [], parts[0]
    for place, term in enumerate(parts[1:]):
        total += term
        if place in wrong:
            total = int(slip(str(total), rng)) if near else _other(total, rng)
        results.append(total)
    return worked(parts, results)


def _other(value: int, rng: random.Random) -> int:
    digits = len(str(value))
    return rng.choice([v for v in range(10 ** (digits - 1), 10**digits) if abs(v - value) > 10] or [value + 11])


def _unsupported(parts: Parts, rng: random.Random) -> str:
    """Right steps, and an answer that does not follow from them."""
    return worked(parts, answer=int(slip(str(sum(parts)), rng)))


def _guessed(parts: Parts, rng: random.Random) -> str:
    """A slip on the way, and the right answer all the same."""
    results = running_totals(parts)
    place = rng.randrange(len(results))
    results[place] = int(slip(str(results[place]), rng))
    return worked(parts, results, sum(parts))


def _miscopied(parts: Parts, rng: random.Random) -> str:
    """Sums that are right, of a term that was not asked for."""
    place = rng.randrange(1, len(parts))
    other = tuple(int(slip(str(v), rng)) or 1 if i == place else v for i, v in enumerate(parts))
    return worked(other)


def _missing(parts: Parts, rng: random.Random) -> str:
    """A step is left out; the answer is right."""
    lines = worked(parts).split("\n")
    del lines[rng.randrange(len(lines) - 1)]
    return "\n".join(lines)


def _anothers(parts: Parts, rng: random.Random) -> str:
    """The right solution of another sum."""
    other = tuple(rng.randint(1, 20) for _ in parts)
    return worked(other if other != parts else other[::-1] if other[::-1] != parts else tuple(v + 1 for v in other))


KINDS: dict[str, Callable[[Parts, random.Random], str]] = {
    "right": lambda parts, rng: worked(parts),
    "far slip": lambda parts, rng: _slipped(parts, rng, 1, near=False),
    "two far slips": lambda parts, rng: _slipped(parts, rng, 2, near=False),
    "near slip": lambda parts, rng: _slipped(parts, rng, 1, near=True),
    "two near slips": lambda parts, rng: _slipped(parts, rng, 2, near=True),
    "unsupported": _unsupported,
    "guessed": _guessed,
    "miscopied": _miscopied,
    "missing step": _missing,
    "another's": _anothers,
}
