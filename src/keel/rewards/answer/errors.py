"""Why a text could not be read as an answer. None of these leaves `equal`: each becomes a verdict."""

from __future__ import annotations


class Unreadable(Exception):
    """The characters themselves: invisible marks, too many of them."""


class NotMath(Exception):
    """No expression at all: words, or a formula that is broken."""


class Unsupported(Exception):
    """Perhaps an expression, but not one that is decided here: the worker's business."""


class TooLarge(Exception):
    """An expression whose value has more digits than anyone will compute."""


class Undefined(Exception):
    """No value: a division by zero, or the root of a negative number where numbers are real."""
