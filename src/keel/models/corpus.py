"""What the bundled models were pretrained on: problems with answers, half of the sums worked step by step, some wrong.

Base models see the noisy mixture; aligned ones are then tuned on clean answers that all show their steps. No held-out
problem of any task occurs in either.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from keel.tasks.problems import LETTERS, SKILLS, SUMS, Family


@dataclass(frozen=True)
class Mixture:
    """The data recipe.

    Args:
        shares: family → relative frequency; sums are named "sum2", "sum3", "sum4".
        worked: share of sums that show their steps.
        wrong: probability that a step is wrong, written down or done in the head. A wrong step is carried on.
    """

    shares: dict[str, float]
    worked: float
    wrong: float


SHARES = {"sum2": 2.0, "sum3": 2.4, "sum4": 1.8, "subtract": 2.0, "sort": 1.0, "reverse": 0.8, "max": 1.0}
MIXTURES = {
    "base": Mixture(SHARES, worked=0.5, wrong=0.15),
    "aligned": Mixture(SHARES, worked=1.0, wrong=0.0),
}
FAMILIES: dict[str, Family] = {family.name: family for family in (*SUMS.values(), *SKILLS.values())}


def example(mixture: Mixture, rng: random.Random) -> tuple[str, str]:
    """One prompt and its completion."""
    [name] = rng.choices(list(mixture.shares), list(mixture.shares.values()))
    family = FAMILIES[name]
    parts = family.draw(rng)
    while family.in_test(parts):
        parts = family.draw(rng)
    if name.startswith("sum"):
        return family.ask(parts), _sum_completion(parts, mixture, rng)
    answer = family.answer(parts)
    return family.ask(parts), f"A:{slip(answer, rng) if rng.random() < mixture.wrong else answer}"


def _sum_completion(parts: tuple[int, ...], mixture: Mixture, rng: random.Random) -> str:
    shown = rng.random() < mixture.worked
    lines, total = [], parts[0]
    for term in parts[1:]:
        result = _add(total, term, mixture, rng)
        lines.append(f"{total}+{term}={result}")
        total = result
    return "\n".join([*lines, f"A:{total}"]) if shown else f"A:{total}"


def _add(total: int, term: int, mixture: Mixture, rng: random.Random) -> int:
    right = total + term
    return int(slip(str(right), rng)) if rng.random() < mixture.wrong else right


def slip(answer: str, rng: random.Random) -> str:
    """A wrong answer that looks like a right one: a number a little off, or a text with one letter changed."""
    if answer.isdigit() and len(answer) < 3:
        value = int(answer)
        return str(rng.choice([v for d in (1, 2, 10) for v in (value - d, value + d) if v >= 0]))
    place = rng.randrange(len(answer))
    alphabet = "0123456789" if answer.isdigit() else LETTERS
    return answer[:place] + rng.choice(alphabet.replace(answer[place], "")) + answer[place + 1 :]
