"""How hard a prompt is for a policy, by how many of its tries succeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from keel.errors import KeelError
from keel.evaluate.suite import Graded
from keel.types import Prompt

Tier = Literal["easy", "medium", "hard"]
TRIES = 8


def tier(right: int, tries: int = TRIES) -> Tier:
    """Of 8 tries: "hard" with at most 2 right, "easy" with at least 6, else "medium"; other numbers of tries by the
    same shares.

    Raises:
        KeelError: not 0 ≤ right ≤ tries, or no tries.

    Source: Tricks or Traps, arXiv 2508.08221, data split by successes of 8 tries. Differs from it: the bounds are ours.
    """
    if not 0 <= right <= tries or tries < 1:
        raise KeelError(f"{right} right of {tries} tries is impossible. Expected 0 ≤ right ≤ tries and at least one try.")
    if 4 * right <= tries:
        return "hard"
    return "easy" if 4 * right >= 3 * tries else "medium"


def tiers(graded: Iterable[Graded]) -> dict[Tier, list[Prompt]]:
    """Prompts by tier, in their order, for instance of `suite.grade(engine, task.train, task, sampling, 8, seed)`."""
    out: dict[Tier, list[Prompt]] = {"easy": [], "medium": [], "hard": []}
    for row in graded:
        out[tier(row.right, len(row.scores))].append(row.prompt)
    return out
