"""The value of a tree where it is rational: as a fraction, or modulo a large prime."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm
from typing import Any

from keel.rewards.answer.budget import spend
from keel.rewards.answer.errors import TooLarge, Undefined, Unsupported
from keel.rewards.answer.syntax import Node

MOST_BITS = 200_000  # of an exact number
_SHAPES = frozenset(("list", "tuple", "set", "such", "matrix", "union", "minus", "field", "rel", "±"))


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
    bits = number.numerator.bit_length() + number.denominator.bit_length()
    if bits > MOST_BITS:
        raise TooLarge("a number of too many digits")
    spend(1 + bits // 4000)
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


def written(node: Node) -> int:
    """Decimal digits of the longest number in a tree."""
    if node[0] == "n":
        return (node[1].numerator.bit_length() + node[1].denominator.bit_length()) * 3 // 10
    return max((written(part) for part in node[1:] if isinstance(part, tuple)), default=0)


def infinite(node: Node) -> bool:
    """Whether a tree is ∞ or −∞."""
    return node == ("c", "inf") or node[0] == "*" and ("c", "inf") in node[1:]


def put(node: Any, at: Mapping[str, Fraction]) -> Any:
    """A tree with numbers for its symbols."""
    if not isinstance(node, tuple):
        return node
    if node[:1] == ("s",):
        return ("n", at[node[1]]) if node[1] in at else node
    return tuple(put(part, at) for part in node)


PRIME = 2**61 - 31


def residue(node: Node, at: Mapping[str, int]) -> int | None:
    """The value modulo PRIME of a tree of sums, products, quotients and whole powers; None of any other.

    Trees with different residues have different values. Trees with the same have the same, but for one chance in 10¹⁸.

    Raises:
        Undefined: a division by zero.
    """
    op = node[0]
    if op == "n":
        value = node[1]
        return value.numerator % PRIME if value.denominator == 1 else value.numerator * _inverse(value.denominator) % PRIME
    if op == "s":
        return at[node[1]]
    if op == "^":
        base, exponent = residue(node[1], at), node[2]
        if base is None or exponent[0] != "n" or exponent[1].denominator != 1:
            return None
        power = exponent[1].numerator
        return pow(base if power >= 0 else _inverse(base), abs(power), PRIME)
    if op not in ("+", "*", "/"):
        return None
    values = [residue(part, at) for part in node[1:]]
    if None in values:
        return None
    if op == "/":
        return values[0] * _inverse(values[1]) % PRIME
    total = 0 if op == "+" else 1
    for value in values:
        total = (total + value if op == "+" else total * value) % PRIME
    return total


def _inverse(value: int) -> int:
    if value % PRIME == 0:
        raise Undefined("division by zero")
    return pow(value, -1, PRIME)
