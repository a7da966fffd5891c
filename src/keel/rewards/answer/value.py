"""Whether two trees have the same value: by exact arithmetic where they are rational, else to as many digits as it takes."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from keel.rewards.answer.budget import spend
from keel.rewards.answer.errors import TooLarge, Undefined, Unsupported
from keel.rewards.answer.exact import PRIME, fold, infinite, put, residue, symbols, written
from keel.rewards.answer.syntax import Node

DIGITS = (50, 250, 800)  # tried in turn, while a value so small or so large that another could be lost takes part
LONGEST = 1000  # decimal digits of a number in a formula that is not rational
LARGEST = 330_000  # bits before the point of any value
POINTS, ENOUGH, NEEDED = 9, 6, 3  # points that symbols are given; how many are looked at; how many must be defined
RESIDUES = 3  # points modulo a prime
_SCALES = ((128, 1900), (1100, 9800), (6200, 70_000))  # of the points, in 2048ths: around 1, and far from it
_LOCK = threading.Lock()  # mpmath keeps constants in places that all threads share
Values = list[Any]


def same_value(a: Node, b: Node) -> bool:
    """Whether two trees have the same value, for all values of their symbols where both are defined and real.

    Rational numbers are compared exactly; everything else to 30 digits, and to more where its numbers have more or
    tiny terms take part. Symbols are given values. A tree without symbols differs from one with some.

    Raises:
        TooLarge, Undefined, Unsupported: there is no value, or none that is computed here.
    """
    a, b = fold(a), fold(b)
    if a == b:
        return True
    if a[0] == b[0] == "n" or infinite(a) or infinite(b):
        return False
    names = symbols(a), symbols(b)
    if not (names[0] == names[1] or names[0] and names[1] and (names[0] <= names[1] or names[1] <= names[0])):
        return False

    def holds(values: Values, earlier: list[Values], tolerance: Any) -> bool:
        return abs(values[0] - values[1]) <= tolerance

    return _everywhere([a, b], names[0] | names[1], holds, lambda values, earlier: values[0] == values[1])


def same_ratio(a: Node, b: Node, positive: bool) -> bool:
    """Whether one tree is a constant times the other, and where asked a positive one: a = 0 and b = 0 say the same.

    Raises:
        TooLarge, Undefined, Unsupported: as in `same_value`.
    """
    names = symbols(a)
    if not names or names != symbols(b):
        return False

    def holds(values: Values, earlier: list[Values], tolerance: Any) -> bool:
        if abs(values[0]) <= tolerance or abs(values[1]) <= tolerance or positive and (values[0] * values[1]).real <= 0:
            return False
        first = earlier[0] if earlier else values
        return abs(values[0] * first[1] - values[1] * first[0]) <= tolerance * (1 + abs(first[0]) + abs(first[1]))

    def residues_hold(values: Values, earlier: list[Values]) -> bool:
        first = earlier[0] if earlier else values
        return all(values) and (values[0] * first[1] - values[1] * first[0]) % PRIME == 0

    return _everywhere([a, b], names, holds, residues_hold)


def number_of(node: Node) -> float:
    """A real number as a float, for sorting.

    Raises:
        Unsupported: it has symbols, or is not real.
    """
    node = fold(node)
    if infinite(node):
        return float("inf") if node[0] == "c" or number_of(node[1]) > 0 else float("-inf")
    if node[0] == "n":
        return _float(node[1])
    if symbols(node):
        raise Unsupported("an end that has symbols")
    with _LOCK:
        numbers = _Numbers(DIGITS[0], real=False)
        value = numbers.value(node, {})
        if abs(numbers.ctx.im(value)) > 1e-30:
            raise Unsupported("an end that is not real")
        return float(numbers.ctx.re(value))


def _float(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError as error:
        raise TooLarge("an end of too many digits") from error


# ---- at points -------------------------------------------------------------------------------------------------------


def _everywhere(
    nodes: list[Node], names: frozenset[str], holds: Callable[..., bool], residues_hold: Callable[[Values, list[Values]], bool]
) -> bool:
    """Whether `holds(values, earlier values, tolerance)` at every point where all nodes have a value."""
    longest = max(map(written, nodes))
    if longest > LONGEST:
        raise TooLarge("a formula with a number of too many digits")
    salt = zlib.crc32(repr(nodes).encode())  # other trees, other points: none can be made to fit them
    if names:
        verdict = _by_residues(nodes, names, salt, residues_hold)
        if verdict is False:
            return False
        if verdict:
            return bool(_at_points(nodes, names, salt, holds, _fraction, None))
    imaginary = any(_has(node, "c", "i") for node in nodes)
    with _LOCK:
        for digits in DIGITS:
            if digits < 30 + 2 * longest:
                continue
            numbers = _Numbers(digits, real=bool(names) and not imaginary)
            verdict = _at_points(nodes, names, salt, holds, numbers.value, numbers)
            if not verdict or not numbers.lost:
                return verdict
    raise TooLarge("too small a difference")


def _by_residues(nodes: list[Node], names: frozenset[str], salt: int, hold: Callable[[Values, list[Values]], bool]) -> bool | None:
    """Modulo a prime, where there are no roots and functions; None where there are."""
    earlier: list[Values] = []
    spend(10)
    for index in range(RESIDUES):
        at = {name: zlib.crc32(f"{name} {index} {salt}".encode()) for name in names}
        try:
            values = [residue(node, at) for node in nodes]
        except Undefined:
            continue
        if None in values:
            return None
        if not hold(values, earlier):
            return False
        earlier.append(values)
    return True if earlier else None


def _fraction(node: Node, at: Mapping[str, Fraction]) -> Fraction:
    value = fold(put(node, at))
    assert value[0] == "n", "a tree that has a residue is rational"
    return value[1]


def _point(names: frozenset[str], index: int, salt: int) -> dict[str, Fraction]:
    """Values for symbols: positive, then all negative, then of either sign and of the other."""
    low, high = _SCALES[index % 3]
    values = {}
    for name in names:
        bits = zlib.crc32(f"{name} {index} {salt}".encode())
        size = Fraction(low + bits % (high - low), 2048)
        sign = zlib.crc32(name.encode()) >> (index // 2) & 1 ^ index & 1 if index > NEEDED else index == NEEDED
        values[name] = -size if sign else size
    return values


def _at_points(nodes: list[Node], names: frozenset[str], salt: int, holds: Any, value: Any, numbers: _Numbers | None) -> bool:
    """At one point exactly (without `numbers`: the rest was done modulo a prime), or at several to many digits."""
    defined: list[Values] = []
    enough, needed = (ENOUGH, NEEDED) if numbers and names else (1, 1)
    for index in range(POINTS if names else 1):
        try:
            values = [value(node, _point(names, index, salt)) for node in nodes]
        except (Undefined, ZeroDivisionError) as error:
            if not names:
                raise Undefined(str(error)) from error
            continue
        if not holds(values, defined, numbers.tolerance if numbers else 0):
            return False
        defined.append(values)
        if len(defined) == enough:
            break
    if len(defined) < needed:
        raise Undefined("too few points where both have a value")
    return True


def _has(node: Node, *wanted: Any) -> bool:
    return node[:2] == wanted or any(isinstance(part, tuple) and _has(part, *wanted) for part in node[1:])


# ---- to many digits --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(DIGITS))
def _context(digits: int) -> Any:
    """Arithmetic of its own to so many digits, apart from the one that everybody shares."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = digits
    return context


class _Numbers:
    """Arithmetic to a number of digits; notices values so small that they may have been lost. Only under the lock.

    Sizes are in bits: the logarithm to the base 2, rounded up.
    """

    def __init__(self, digits: int, real: bool):
        self.ctx = _context(digits)
        self.real, self.lost, self.largest, self.cost = real, False, 1, digits // 50
        self.safe, self.noise = self.ctx.prec // 4, self.ctx.prec - 66

    @property
    def tolerance(self) -> Any:
        """What two equal values may differ by."""
        return self.ctx.ldexp(1, self.largest - self.noise)

    def value(self, node: Node, at: Mapping[str, Fraction]) -> Any:
        """The value of a tree at a point."""
        spend(self.cost)
        value = self._value(node, at)
        if value:
            size = self.ctx.mag(value)
            if not isinstance(size, int) or size > LARGEST:
                raise TooLarge("a value of too many digits")
            self.lost |= abs(size) > self.safe
            self.largest = max(self.largest, size)
        return value

    def number(self, number: Fraction) -> Any:
        return self.ctx.mpf(number.numerator) / number.denominator

    def _value(self, node: Node, at: Mapping[str, Fraction]) -> Any:
        op = node[0]
        if op == "n":
            return self.number(node[1])
        if op == "s":
            return self.number(at[node[1]])
        if op == "c":
            return self._constant(node[1])
        if op == "f":
            return self._function(node[1], [self.value(part, at) for part in node[2:]])
        if op == "log":
            return self._logarithm(node, at)
        if op == "root":
            return self.power(self.value(node[2], at), Fraction(1, node[1]))
        if op == "^":
            return self._raised(node, at)
        values = [self.value(part, at) for part in node[1:]]
        if op == "+":
            return self._sum(values)
        if op == "*":
            return self.ctx.fprod(values)
        if not values[1]:
            raise Undefined("division by zero")
        return values[0] / values[1]

    def _sum(self, values: Values) -> Any:
        """Their sum; zero where it is so small against its terms that only rounding is left."""
        total, sizes = sum(values), [self.ctx.mag(value) for value in values if value]
        if not total or not sizes:
            return total
        self.lost |= min(sizes) < max(sizes) - self.safe
        return total if self.ctx.mag(total) > max(sizes) - self.noise else self.ctx.zero

    def _constant(self, name: str) -> Any:
        if name == "inf":
            raise Unsupported("arithmetic with infinity")
        return self.ctx.j if name == "i" else +getattr(self.ctx, name)

    def _raised(self, node: Node, at: Mapping[str, Fraction]) -> Any:
        if node[1] == ("c", "e"):
            exponent = self.value(node[2], at)
            if abs(exponent) > 200_000:
                raise TooLarge("a power of too many digits")
            return self.ctx.exp(exponent)
        base = self.value(node[1], at)
        return self.power(base, node[2][1] if node[2][0] == "n" else self.value(node[2], at))

    def power(self, base: Any, exponent: Any) -> Any:
        """base^exponent; of a negative base the real root, where the exponent is a fraction with an odd denominator."""
        if not base:
            if (exponent.real if not isinstance(exponent, Fraction) else exponent) <= 0:
                raise Undefined("a power of zero")
            return base
        times = abs(self.number(exponent) if isinstance(exponent, Fraction) else exponent)
        if (abs(self.ctx.mag(base)) + 1) * times > LARGEST:
            raise TooLarge("a power of too many digits")
        negative = self.ctx.im(base) == 0 and self.ctx.re(base) < 0
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return base**exponent.numerator
            if negative and exponent.denominator % 2:
                return (-1) ** (exponent.numerator % 2) * (-base) ** self.number(exponent)
            exponent = self.number(exponent)
        if negative and self.real:
            raise Undefined("a root of a negative number")
        return base**exponent

    def _logarithm(self, node: Node, at: Mapping[str, Fraction]) -> Any:
        """To a base that nobody named: a number that stands for itself, so that \\log is neither \\ln nor \\log_{10}."""
        base = self.ctx.mpf("7.389176501") if node[1] is None else self.value(node[1], at)
        if not base or base == 1:
            raise Undefined("a logarithm to the base 0 or 1")
        return self._ln(self.value(node[2], at)) / self._ln(base)

    def _ln(self, value: Any) -> Any:
        if not value or self.real and value < 0:
            raise Undefined("the logarithm of a number that is not positive")
        return self.ctx.ln(value)

    def _function(self, name: str, values: list[Any]) -> Any:
        ctx, x = self.ctx, values[0]
        if name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "coth", "sec", "csc", "cot") and abs(x) > 200_000:
            raise TooLarge("a function of so large a number")
        if name in ("arcsin", "arccos", "arctan"):
            value = getattr(ctx, "a" + name[3:])(x)
            if self.real and ctx.im(value):
                raise Undefined(f"{name} outside its domain")
            return value
        if name == "ln":
            return self._ln(x)
        if name == "abs":
            return abs(x)
        if name in ("floor", "ceil", "max", "min", "sgn", "gcd", "lcm"):
            if ctx.im(x) or name in ("gcd", "lcm"):
                raise Unsupported(f"{name} of that")
            return (
                max(values) if name == "max" else min(values) if name == "min" else getattr(ctx, {"sgn": "sign"}.get(name, name))(x)
            )
        if name in ("factorial", "binomial"):
            if any(abs(value) > 2000 for value in values):
                raise TooLarge(f"a {name} of too many digits")
            return getattr(ctx, name)(*values)
        try:
            return getattr(ctx, name)(x)
        except ZeroDivisionError as error:
            raise Undefined(f"{name} at a pole") from error
