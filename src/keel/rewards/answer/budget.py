"""How much arithmetic one decision may take: counted and not timed, so that a verdict is the same on every machine."""

from __future__ import annotations

import threading

from keel.rewards.answer.errors import TooLarge

MOST = 20_000  # steps: a node at 50 digits is one, a function at 800 digits or a number of 60,000 bits is 16


class _Left(threading.local):
    steps: int = MOST


_LEFT = _Left()


def renew() -> None:
    """A new decision begins, in this thread."""
    _LEFT.steps = MOST


def spend(steps: int) -> None:
    """Take steps.

    Raises:
        TooLarge: there are not so many left.
    """
    _LEFT.steps -= steps
    if _LEFT.steps < 0:
        raise TooLarge("too much to compute")
