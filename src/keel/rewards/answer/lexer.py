"""Cleaned text → tokens, and the names that mean something in mathematics."""

from __future__ import annotations

import re
from typing import NamedTuple

from keel.rewards.answer.errors import NotMath

MOST_TOKENS = 600
_TOKEN = re.compile(
    r"(?P<num>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?![\d.A-Za-z]))?|\.\d+)"
    r"|(?P<cmd>\\[A-Za-z]+|\\[{}|\\])|(?P<word>[A-Za-z]+)|(?P<op>\*\*|<=|>=|!=|==|[-+*/^_=<>()\[\]{},;|!:&'%°])|(?P<space>\s+)"
)
FUNCTIONS = frozenset(
    (
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth exp ln floor ceil abs asin acos atan gcd lcm max min sgn"
    ).split()
)
SAME = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
GREEK = frozenset(
    (
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega Gamma "
        "Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
    ).split()
)
CONSTANTS = {"pi": "pi", "e": "e", "i": "i", "infty": "inf", "inf": "inf", "infinity": "inf", "oo": "inf", "imath": "i"}
RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\in": "in", "\\approx": "~"}
JOINTS = {",": ",", ";": ",", "or": "or", "and": "and", "\\lor": "or", "\\vee": "or", "\\land": "and", "\\wedge": "and"}
FIELDS = {"R": "R"}
ENGLISH = frozenset("if is no not for per to of on at by as be it we all any".split())
VARIABLES = frozenset("xyzuvwmnpqrstk")
SHAPES = frozenset(("tuple", "set", "list", "rel", "matrix", "union", "such", "field"))
OPENERS = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "{": ("}",), "\\langle": ("\\rangle",), "<": (">",)}
FOR_THE_WORKER = frozenset(
    (
        "int iint oint sum prod lim to mapsto det gcd bmod pmod mod cap vec partial nabla prime arccot arcsec arccsc cong equiv "
        "approx in notin subset subseteq mid overline bar hat dot perp parallel triangle angle mathbb mathcal"
    ).split()
)
CLOSING = frozenset(
    (
        "\\}",
        "\\rangle",
        "\\mid",
        "\\cup",
        "\\setminus",
        "\\rfloor",
        "\\rceil",
        "\\end",
        "\\\\",
        "\\pm",
        "\\mp",
        "\\approx",
        "\\to",
        "\\cap",
    )
)


class Token(NamedTuple):
    kind: str
    text: str
    spaced: bool  # whether a space stands before it


def tokenize(text: str) -> list[Token]:
    """Tokens of a cleaned text.

    Raises:
        NotMath: a character that no formula has, or too many tokens.
    """
    tokens, position, spaced = [], 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) > MOST_TOKENS:
            raise NotMath(f"{text[position]!r} is no part of a formula" if match is None else "too long a formula")
        position = match.end()
        if match.lastgroup != "space":
            tokens.append(Token(str(match.lastgroup), match[0], spaced))
        spaced = match.lastgroup == "space"
    return tokens
