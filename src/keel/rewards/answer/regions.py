"""Regions of the real line: pieces between two ends, each of which belongs to it or not."""

from __future__ import annotations

from keel.rewards.answer.errors import Unsupported
from keel.rewards.answer.syntax import Node, negative
from keel.rewards.answer.value import number_of, same_value

INFINITY: Node = ("c", "inf")
Piece = tuple[Node, bool, Node, bool]  # lower end, is it left out, upper end, is it left out
LINE: tuple[Piece, ...] = ((negative(INFINITY), True, INFINITY, True),)


def without(pieces: tuple[Piece, ...], points: tuple[Node, ...]) -> tuple[Piece, ...]:
    """Pieces with points taken out."""
    for point in points:
        at, cut = number_of(point), []
        for low, low_open, high, high_open in pieces:
            if number_of(low) < at < number_of(high):
                cut += [(low, low_open, point, True), (point, True, high, high_open)]
            elif number_of(low) == at or number_of(high) == at:
                cut.append((low, low_open or number_of(low) == at, high, high_open or number_of(high) == at))
            else:
                cut.append((low, low_open, high, high_open))
        pieces = tuple(cut)
    return pieces


def intersection(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """What lies in both."""
    found = []
    for a in left:
        for b in right:
            low, low_open = max((a[:2], b[:2]), key=lambda end: (number_of(end[0]), end[1]))
            high, high_open = min((a[2:], b[2:]), key=lambda end: (number_of(end[0]), not end[1]))
            if not _empty((low, low_open, high, high_open)):
                found.append((low, low_open, high, high_open))
    return tuple(found)


def _empty(piece: Piece) -> bool:
    low, high = number_of(piece[0]), number_of(piece[2])
    return low > high or low == high and (piece[1] or piece[3])


def tidy(pieces: tuple[Piece, ...]) -> list[Piece]:
    """In order, those that touch as one."""
    out: list[Piece] = []
    for piece in sorted((p for p in pieces if not _empty(p)), key=lambda p: (number_of(p[0]), p[1])):
        if out:
            low, low_open, high, high_open = out[-1]
            gap = number_of(piece[0]) - number_of(high)
            if gap < 0 or gap == 0 and not (high_open and piece[1]):
                further = max(((high, high_open), piece[2:]), key=lambda end: (number_of(end[0]), not end[1]))
                out[-1] = (low, low_open, *further)
                continue
        out.append(piece)
    return out


def same_region(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> bool:
    """Whether two regions are the same."""
    left, right = tidy(a), tidy(b)
    return len(left) == len(right) and all(
        p[1] == q[1] and p[3] == q[3] and same_value(p[0], q[0]) and same_value(p[2], q[2])
        for p, q in zip(left, right, strict=True)
    )


def backwards(low: Node, high: Node) -> bool:
    """Whether an interval ends before it begins."""
    try:
        return number_of(low) > number_of(high)
    except Unsupported:
        return False  # ends with symbols
