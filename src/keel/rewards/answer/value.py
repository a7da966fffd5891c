"""The value of a tree: exactly where it is rational, else to as many digits as the decision needs."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm
from typing import Any

from keel.rewards.answer.errors import TooLarge, Undefined, Unsupported
from keel.rewards.answer.syntax import Node

MOST_BITS = 200_000  # of an exact number
DIGITS = (50, 250, 800)  # tried in turn, while a value so small that it could be lost takes part
POINTS, NEEDED = 7, 3  # values that symbols are given, and how many of them must be defined
_SHAPES = frozenset(("list", "tuple", "set", "such", "matrix", "union", "minus", "field", "rel", "±"))
_LOCK = threading.Lock()  # mpmath keeps constants in places that all threads share


def fold(node: Node) -> Node:
    """The same tree with every rational part computed.

    Raises:
        TooLarge: an exact number of more than MOST_BITS. Undefined: a division by zero. Unsupported: a set in a sum.
    """
    op = node[0]
    if op in ("n", "s", "c"):
        return node
    if op in _SHAPES:
        raise Unsupported("arithmetic with sets or equations")
    parts = [fold(part) if isinstance(part, tuple) else part for part in node[1:]]
    numbers = [part[1] for part in parts if isinstance(part, tuple) and part[0] == "n"]
    whole = len(numbers) == sum(isinstance(part, tuple) for part in parts)
    exact = _exact(op, parts, numbers) if whole else None
    if exact is None and op == "/" and parts[1] == ("n", 0):
        raise Undefined("division by zero")
    return (op, *parts) if exact is None else ("n", _bounded(exact))


def _exact(op: str, parts: list[Any], numbers: list[Fraction]) -> Fraction | None:
    if op == "+":
        return sum(numbers, Fraction(0))
    if op == "*":
        product = Fraction(1)
        for number in numbers:
            product = _bounded(product * number)
        return product
    if op == "/":
        if numbers[1] == 0:
            raise Undefined("division by zero")
        return numbers[0] / numbers[1]
    if op == "^":
        return exact_power(*numbers)
    if op == "root":
        return exact_root(numbers[0], parts[0])
    if op == "f":
        return _exact_function(parts[0], numbers)
    return None


def _bounded(number: Fraction) -> Fraction:
    if number.numerator.bit_length() + number.denominator.bit_length() > MOST_BITS:
        raise TooLarge("a number of too many digits")
    return number


def exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base^exponent where it is rational; None where it is not. A negative base has its real root, if there is one."""
    if exponent.denominator != 1:
        root = exact_root(base, exponent.denominator) if exponent.denominator <= 100 else None
        return None if root is None else exact_power(root, Fraction(exponent.numerator))
    power = exponent.numerator
    if base == 0 and power <= 0:
        raise Undefined("a power of zero")
    if base in (0, 1, -1):
        return base if base != -1 else Fraction(-1 if power % 2 else 1)
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MOST_BITS:
        raise TooLarge("a power of too many digits")
    return base**power


def exact_root(number: Fraction, degree: int) -> Fraction | None:
    """The real root where it is rational, else None."""
    if number < 0:
        root = exact_root(-number, degree) if degree % 2 else None
        return None if root is None else -root
    top, bottom = _integer_root(number.numerator, degree), _integer_root(number.denominator, degree)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = isqrt(number)
    elif number.bit_length() > 900:
        return None
    else:
        root = round(number ** (1 / degree))
        while root**degree > number:
            root -= 1
        while (root + 1) ** degree <= number:
            root += 1
    return root if root**degree == number else None


def _exact_function(name: str, numbers: list[Fraction]) -> Fraction | None:
    whole = all(number.denominator == 1 for number in numbers)
    if name == "factorial" and whole and numbers[0] >= 0:
        if numbers[0] > 5000:
            raise TooLarge("a factorial of too many digits")
        return Fraction(factorial(int(numbers[0])))
    if name == "binomial" and whole and 0 <= numbers[1] <= numbers[0]:
        if numbers[0] > 5000:
            raise TooLarge("a binomial coefficient of too many digits")
        return Fraction(comb(int(numbers[0]), int(numbers[1])))
    if name == "abs":
        return abs(numbers[0])
    if name in ("floor", "ceil"):
        return Fraction(numbers[0].__floor__() if name == "floor" else numbers[0].__ceil__())
    if name in ("max", "min"):
        return max(numbers) if name == "max" else min(numbers)
    if name in ("gcd", "lcm") and whole:
        return Fraction((gcd if name == "gcd" else lcm)(*map(int, numbers)))
    return None


def symbols(node: Node) -> frozenset[str]:
    """Names of all symbols in a tree."""
    if node[0] == "s":
        return frozenset((node[1],))
    found: set[str] = set()
    for part in node[1:]:
        if isinstance(part, tuple) and part:
            found |= symbols(part) if isinstance(part[0], str) else frozenset().union(*map(symbols, part))
    return frozenset(found)


def _has(node: Node, *wanted: Any) -> bool:
    return node[:2] == wanted or any(isinstance(part, tuple) and _has(part, *wanted) for part in node[1:])


# ---- to many digits --------------------------------------------------------------------------------------------------


class _Numbers:
    """Arithmetic to a number of digits; notices values so small that they may have been lost."""

    def __init__(self, digits: int, real: bool):
        from mpmath.ctx_mp import MPContext

        self.ctx = MPContext()
        self.ctx.dps, self.real, self.lost, self.largest = digits, real, False, self.ctx.mpf(1)
        self.tiny = self.ctx.mpf(10) ** (-digits // 2)
        self.huge = self.ctx.mpf(10) ** 100_000

    def value(self, node: Node, at: Mapping[str, Fraction]) -> Any:
        value = self._value(node, at)
        size = abs(value)
        if not self.ctx.isfinite(value) or size > self.huge:
            raise TooLarge("a value of too many digits")
        if size and not self.tiny < size < 1 / self.tiny:
            self.lost = True
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
            sizes = [abs(value) for value in values if value]
            self.lost |= bool(sizes) and min(sizes) < max(sizes) * self.tiny
            return self.ctx.fsum(values)
        if op == "*":
            return self.ctx.fprod(values)
        if not values[1]:
            raise Undefined("division by zero")
        return values[0] / values[1]

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
        size = abs(self.ctx.log(abs(base)))
        times = abs(self.number(exponent) if isinstance(exponent, Fraction) else exponent)
        if size * times > 200_000:
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


def point(names: frozenset[str], index: int) -> dict[str, Fraction]:
    """Values for symbols: the same for the same name, positive in the first NEEDED points, then of either sign."""
    values = {}
    for name in names:
        bits = zlib.crc32(f"{name} {index} keel".encode())
        size = Fraction(bits % 99991 + 20011, 40009)
        values[name] = -size if index >= NEEDED and bits >> 31 else size
    return values


def same_value(a: Node, b: Node) -> bool:
    """Whether two trees have the same value, for all values of their symbols where both are defined and real.

    Rational numbers are compared exactly; everything else to 30 digits, or to 780 where tiny terms take part. Symbols are
    given values; trees with different symbols differ.

    Raises:
        TooLarge, Undefined, Unsupported: there is no value, or none that is computed here.
    """
    a, b = fold(a), fold(b)
    if a == b:
        return True
    if a[0] == b[0] == "n" or infinite(a) or infinite(b):
        return False
    names = symbols(a)
    return names == symbols(b) and same_everywhere([a, b], names, _equal)


def _equal(values: list[Any], tolerance: Any, earlier: list[Any]) -> bool:
    return abs(values[0] - values[1]) <= tolerance


def same_everywhere(nodes: list[Node], names: frozenset[str], holds: Any) -> bool:
    """Whether `holds(values, tolerance, earlier values)` at every point where all nodes have a value."""
    imaginary = any(_has(node, "c", "i") for node in nodes)
    with _LOCK:
        for digits in DIGITS:
            numbers = _Numbers(digits, real=bool(names) and not imaginary)
            verdict = _at_points(numbers, nodes, names, holds)
            if not verdict or not numbers.lost:
                return verdict
    return verdict


def _at_points(numbers: _Numbers, nodes: list[Node], names: frozenset[str], holds: Any) -> bool:
    defined: list[Any] = []
    for index in range(POINTS if names else 1):
        try:
            values = [numbers.value(node, point(names, index)) for node in nodes]
        except (Undefined, ZeroDivisionError) as error:
            if not names:
                raise Undefined(str(error)) from error
            continue
        tolerance = numbers.largest * numbers.ctx.mpf(10) ** (20 - numbers.ctx.dps)
        if not holds(values, tolerance, defined):
            return False
        defined.append(values)
    if len(defined) < min(NEEDED, POINTS if names else 1):
        raise Undefined("too few points where both have a value")
    return True


def infinite(node: Node) -> bool:
    """Whether a tree is ∞ or −∞."""
    return node == ("c", "inf") or node[0] == "*" and ("c", "inf") in node[1:]


def number_of(node: Node) -> float:
    """A real number as a float, for sorting.

    Raises:
        Unsupported: it has symbols, or is not real.
    """
    node = fold(node)
    if node == ("c", "inf"):
        return float("inf")
    if node[0] == "*" and node[1][0] == "n" and node[2:] == (("c", "inf"),):
        return float("inf") if node[1][1] > 0 else float("-inf")
    if symbols(node):
        raise Unsupported("an end that has symbols")
    with _LOCK:
        numbers = _Numbers(DIGITS[0], real=False)
        value = numbers.value(node, {})
        if abs(numbers.ctx.im(value)) > 1e-30:
            raise Unsupported("an end that is not real")
        return float(numbers.ctx.re(value))
