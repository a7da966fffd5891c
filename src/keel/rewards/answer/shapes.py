"""What kind of thing an answer is (a value, a set, an interval, an equation …), and when two of them are the same."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from keel.rewards.answer.errors import NotMath, Undefined, Unsupported
from keel.rewards.answer.exact import fold, infinite, put, symbols
from keel.rewards.answer.regions import INFINITY, LINE, Piece, backwards, intersection, same_region, without
from keel.rewards.answer.syntax import Node, negative
from keel.rewards.answer.value import number_of, same_ratio, same_value

MOST_ITEMS = 100
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


@dataclass(frozen=True)
class Shape:
    """kind: value | about | assign | named | equation | inequality | list | set | tuple | matrix | region; `items`: what it holds.

    name: the variable of an assignment or a region, "" where nobody named it.
    """

    kind: str
    items: tuple[Any, ...]
    name: str = ""


def shape(node: Node) -> Shape:
    """The kind of a tree.

    Raises:
        NotMath, Unsupported: it is of none.
    """
    op = node[0]
    if _signs(node):
        return _list("or", tuple(_branch(node, sign) for sign in (1, -1)))
    if op == "list":
        return _list(node[1], node[2])
    if op == "rel":
        return _relation(node[1], node[2])
    if op == "tuple":
        return _tuple(node)
    if op == "+" and node[1][0] == "field" and all(part[0] == "*" and part[2][0] == "set" for part in node[2:]):
        return _region_of(("minus", node[1], ("set", tuple(item for part in node[2:] for item in part[2][1]))))
    if op == "set":
        if len(node[1]) > 1 and all(item[0] == "rel" for item in node[1]):
            return shape(("list", ",", node[1]))
        return Shape("set", _flat(tuple(_item(item) for item in node[1])))
    if op == "matrix":
        return Shape("matrix", tuple(tuple(_item(cell) for cell in row) for row in node[1]))
    if op in ("union", "minus", "field", "such"):
        return _region_of(node)
    return Shape("value", (node,))


def _item(node: Node) -> Shape:
    return shape(node)


def _signs(node: Node) -> bool:
    """Whether a ± stands in a value or on the right of an equation."""
    if node[0] == "±":
        return True
    return node[0] not in ("list", "set", "tuple", "matrix", "union") and any(
        _signs(part) if part and isinstance(part[0], str) else any(isinstance(p, tuple) and _signs(p) for p in part)
        for part in node[1:]
        if isinstance(part, tuple) and part
    )


def _branch(node: Any, sign: int) -> Any:
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "±":
        right = _branch(node[3], sign)
        return ("+", _branch(node[2], sign), right if node[1] * sign > 0 else negative(right))
    return tuple(_branch(part, sign) for part in node)


def _flat(items: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Items of a list inside a list (from a ±) stand in the outer one."""
    return tuple(inner for item in items for inner in (item.items if item.kind == "list" else (item,)))


def _list(joint: str, nodes: tuple[Node, ...]) -> Shape:
    items = _flat(tuple(shape(node) for node in nodes))
    if len(items) > MOST_ITEMS:
        raise NotMath(f"more than {MOST_ITEMS} items")
    kinds = {item.kind for item in items}
    names = [item.name for item in items if item.kind == "assign"]
    if kinds == {"assign"} and len(names) > 1 and all("_" in name for name in names) and len({n.split("_")[0] for n in names}) == 1:
        return Shape("list", tuple(Shape("value", item.items) for item in items), names[0].split("_")[0])
    if kinds == {"assign"} and len(set(names)) == len(names):
        return Shape("named", tuple(sorted(items, key=lambda item: item.name)))
    if kinds <= {"assign", "value"} and len(set(names)) <= 1 and (not names or items[0].kind == "assign"):
        return Shape("list", tuple(Shape("value", item.items) for item in items), names[0] if names else "")
    if kinds == {"region"} and len({item.name for item in items}) == 1:
        return _joined(joint, items)
    return Shape("list", items)


def _joined(joint: str, items: tuple[Shape, ...]) -> Shape:
    both = items[0]
    for item in items[1:]:
        both = Shape("region", intersection(both.items, item.items), both.name)
    if joint == "and" or joint == "," and both.items:
        return both
    return Shape("region", tuple(piece for item in items for piece in item.items), items[0].name)


def _tuple(node: Node) -> Shape:
    opening, closing, items = node[1:]
    if (opening, closing) in (("(", "]"), ("[", ")")) and len(items) != 2:
        raise NotMath("brackets that do not fit")
    inner = tuple(shape(item) for item in items)
    if opening == closing == "":
        raise NotMath("no brackets")
    if opening == "[" and closing == "]" and inner and all(item.kind == "tuple" and item.name == "[]" for item in inner):
        if len({len(item.items) for item in inner}) == 1:
            return Shape("matrix", tuple(item.items for item in inner))
    if len(items) == 2 and ((opening, closing) not in (("(", ")"), ("[", "]")) or any(infinite(item) for item in items)):
        if backwards(*items):
            raise NotMath("an interval that ends before it begins")
        return Shape("region", ((items[0], opening == "(", items[1], closing == ")"),))
    return Shape("tuple", inner, opening + closing)


# ---- equations and inequalities --------------------------------------------------------------------------------------


def _relation(operators: tuple[str, ...], sides: tuple[Node, ...]) -> Shape:
    if set(operators) == {"="}:
        return _equation(sides)
    if operators[-1] == "~" and set(operators) <= {"=", "~"}:
        return _about(operators, sides)
    if operators == ("in",):
        return _membership(*sides)
    if operators == ("!=",):
        if sides[0][0] != "s":
            raise Unsupported("a ≠ of that kind")
        return Shape("region", without(LINE, (sides[1],)), sides[0][1])
    if set(operators) <= set(_TURNED):
        pieces = [_inequality(op, a, b) for op, a, b in zip(operators, sides, sides[1:], strict=False)]
        if len(pieces) == 1:
            return pieces[0]
        if len(pieces) == 2 and all(piece.kind == "region" for piece in pieces) and pieces[0].name == pieces[1].name:
            return Shape("region", intersection(pieces[0].items, pieces[1].items), pieces[0].name)
    raise Unsupported("relations of several kinds")


def _about(operators: tuple[str, ...], sides: tuple[Node, ...]) -> Shape:
    """√2 ≈ 1.41: either of the two, where the one is the other to its last digit. x ≈ 1.41 is x = 1.41."""
    first = operators.index("~")
    exact = _equation(sides[: first + 1]) if first else Shape("value", sides[:1])
    if first == 0 and lone_name(sides[0]):
        exact = Shape("assign", sides[1:2], lone_name(sides[0]))
    rounded = fold(sides[-1])
    if exact.kind not in ("value", "assign") or rounded[0] != "n" or first != len(operators) - 1:
        raise Unsupported("an approximation of that kind")
    places = next((k for k in range(60) if 10**k % rounded[1].denominator == 0), None)
    value, shown = number_of(exact.items[0]), number_of(rounded)
    if places is None or not (abs(value - shown) <= 0.5001 * 10.0**-places or 0 <= abs(value) - abs(shown) < 10.0**-places):
        raise NotMath("an approximation that is none")
    return Shape("about", (Shape("value", exact.items), Shape("value", (rounded,))))


def _membership(left: Node, right: Node) -> Shape:
    inner = shape(right)
    if inner.kind == "tuple" and inner.name in ("()", "[]") and len(inner.items) == 2:
        inner = Shape("region", _pieces(inner))
    if left[0] != "s" or inner.kind not in ("region", "set"):
        raise Unsupported("a membership of that kind")
    return Shape(inner.kind, inner.items, left[1] if inner.kind == "region" else "")


def lone_name(node: Node) -> str:
    """ "x" of x; "" of anything else. (f(x) = … is a symbol by now.)"""
    return node[1] if node[0] == "s" else ""


def _equation(sides: tuple[Node, ...]) -> Shape:
    first = lone_name(sides[0])
    values = sides[1:] if first else sides
    if all(not symbols(side) for side in values) and all(side[0] not in ("tuple", "set", "list", "matrix") for side in values):
        if not all(same_value(values[0], value) for value in values[1:]):
            raise NotMath("a chain of numbers that are not equal")
        return Shape("assign", (values[-1],), first) if first else Shape("value", (values[-1],), "=")
    if len(sides) == 2 and sides[0][0] == "tuple" and sides[1][0] == "tuple":
        return shape(sides[1])
    if first and len(sides) == 2:
        inner = shape(sides[1])
        if inner.kind == "value":
            return Shape("assign", (sides[1],), first)
        return inner if inner.kind in ("set", "matrix", "tuple") else Shape("list", inner.items, first)
    if len(sides) == 2 and lone_name(sides[1]) and not symbols(sides[0]):
        return Shape("assign", (sides[0],), lone_name(sides[1]))
    if len(sides) != 2:
        raise Unsupported("a chain of equations")
    return Shape("equation", (_difference(*sides),))


def _difference(a: Node, b: Node) -> Node:
    return fold(("+", a, negative(b)))


def _inequality(op: str, a: Node, b: Node) -> Shape:
    """a region where it is linear in one symbol, else (op, difference) with the difference < 0 or <= 0."""
    if op in (">", ">="):
        op, a, b = _TURNED[op], b, a
    if infinite(a) or infinite(b):
        raise Unsupported("an inequality with infinity")
    difference = _difference(a, b)
    names = symbols(difference)
    solved = not symbols(a) and _multiple(b) or not symbols(b) and _multiple(a)
    end = _zero(difference, next(iter(names))) if solved and len(names) == 1 else None
    if end is None:
        return Shape("inequality", (op, difference))
    zero, rising = end
    open_end = op == "<"
    piece: Piece = (negative(INFINITY), True, zero, open_end) if rising else (zero, open_end, INFINITY, True)
    return Shape("region", (piece,), next(iter(names)))


def _multiple(node: Node) -> bool:
    """Whether a tree is a symbol or a number times one: an inequality with more than that is not solved."""
    return node[0] == "s" or node[0] == "*" and any(_multiple(part) for part in node[1:]) and len(symbols(node)) == 1


def _zero(node: Node, name: str) -> tuple[Node, bool] | None:
    """Where a linear function of one symbol is zero, and whether it rises; None where it is not linear."""
    at = [fold(put(node, {name: Fraction(x)})) for x in (0, 1, 2, 5)]
    slope = fold(("+", at[1], negative(at[0])))
    if not same_value(("+", at[2], negative(at[1])), slope) or not same_value(
        ("+", at[3], negative(at[0])), ("*", ("n", Fraction(5)), slope)
    ):
        return None
    rise = number_of(slope)
    return (fold(("/", negative(at[0]), slope)), rise > 0) if rise else None


# ---- regions of the line ---------------------------------------------------------------------------------------------


def _region_of(node: Node) -> Shape:
    if node[0] == "field":
        return Shape("region", LINE)
    if node[0] == "such":
        head, inner = node[1], shape(node[2])
        within = LINE
        if head[0] == "rel" and head[1] == ("in",):
            head, within = head[2][0], _pieces(shape(head[2][1]))
        if inner.kind != "region" or head != ("s", inner.name):
            raise Unsupported("a set with a condition of that kind")
        return Shape("region", intersection(inner.items, within))
    if node[0] == "minus":
        points = shape(node[2])
        if points.kind != "set" or any(item.kind != "value" for item in points.items):
            raise Unsupported("a difference of that kind")
        return Shape("region", without(_pieces(shape(node[1])), tuple(item.items[0] for item in points.items)))
    return Shape("region", tuple(piece for part in node[1] for piece in _pieces(shape(part))))


def _pieces(found: Shape) -> tuple[Piece, ...]:
    """A region's pieces; a pair in brackets is an interval, a set is its points."""
    if found.kind == "region":
        return found.items
    if found.kind == "tuple" and len(found.items) == 2 and found.name in ("()", "[]"):
        low, high = (item.items[0] for item in found.items)
        if all(item.kind == "value" for item in found.items):
            return ((low, found.name == "()", high, found.name == "()"),)
    if found.kind == "set" and all(item.kind == "value" for item in found.items):
        return tuple((item.items[0], False, item.items[0], False) for item in found.items)
    raise Unsupported("a region of that kind")


# ---- the same? -------------------------------------------------------------------------------------------------------


def same(a: Shape, g: Shape) -> bool:
    """Whether an answer is the gold answer. Order counts in tuples and matrices, not in sets and lists. {5} may be given as 5.

    Raises:
        NotMath, Unsupported, TooLarge, Undefined: that cannot be told here.
    """
    if "about" in (a.kind, g.kind):
        return any(same(x, y) for x in _meant(a) for y in _meant(g))
    if "set" in (a.kind, g.kind) and {a.kind, g.kind} & {"value", "assign"}:
        return len(a.items) == len(g.items) == 1 and _one(a, g)
    return _alike(a, g)


def _meant(found: Shape) -> tuple[Shape, ...]:
    return found.items if found.kind == "about" else (found,)


def _alike(a: Shape, g: Shape) -> bool:
    kinds = (a.kind, g.kind)
    if kinds == ("value", "value") or {*kinds} == {"assign", "value"} and "=" not in (a.name, g.name):
        return same_value(a.items[0], g.items[0])
    if kinds == ("assign", "assign"):
        return a.name == g.name and same_value(a.items[0], g.items[0]) or _same_equation(a, g)
    if {*kinds} <= {"assign", "equation"}:
        return not _unsolved(a, g) and _same_equation(a, g)
    if kinds == ("inequality", "inequality"):
        return a.items[0] == g.items[0] and same_ratio(a.items[1], g.items[1], positive=True)
    if kinds == ("named", "named"):
        return [i.name for i in a.items] == [i.name for i in g.items] and _pairwise(a, g)
    if {*kinds} == {"named", "tuple"}:
        return _pairwise(a, g) and {a.name, g.name} == {"", "()"}
    if {*kinds} == {"set"}:
        return _covers(a.items, g.items) and _covers(g.items, a.items)
    if {*kinds} == {"list", "set"} or kinds == ("list", "list"):
        return (not a.name or not g.name or a.name == g.name) and _matched(a.items, g.items)
    if kinds == ("tuple", "tuple"):
        alike = a.name == g.name or len(a.items) > 2 and {a.name, g.name} == {"()", "[]"}
        return alike and _pairwise(a, g)
    if kinds == ("matrix", "matrix"):
        return len(a.items) == len(g.items) and all(
            _pairwise(Shape("", p), Shape("", q)) for p, q in zip(a.items, g.items, strict=True)
        )
    if "region" in kinds and {*kinds} <= {"region", "tuple", "set"}:
        return (not a.name or not g.name or "tuple" in kinds or a.name == g.name) and _same_pieces(a, g)
    return False


def _same_pieces(a: Shape, g: Shape) -> bool:
    for pair in (s for s in (a, g) if s.kind == "tuple"):
        if len(pair.items) != 2 or pair.name not in ("()", "[]") or not _two_ends(pair):
            return False
    return same_region(_pieces(a), _pieces(g))


def _two_ends(pair: Shape) -> bool:
    """Whether a pair in brackets may be an interval: (5, 2) and (1, 1) are points."""
    low, high = (item.items[0] for item in pair.items)
    return all(item.kind == "value" for item in pair.items) and not backwards(low, high) and not same_value(low, high)


def _one(a: Shape, g: Shape) -> bool:
    left, right = (s.items[0] if s.kind == "set" else s for s in (a, g))
    return left.kind == "value" and _alike(left, right)


def _same_equation(a: Shape, g: Shape) -> bool:
    left, right = (s.items[0] if s.kind == "equation" else _as_difference(s) for s in (a, g))
    if left is None or right is None:
        return False
    return same_ratio(left, right, positive=False)


def _unsolved(a: Shape, g: Shape) -> bool:
    """Whether gold is x = 2 and the answer an equation from which that follows: it may be the problem itself."""
    return g.kind == "assign" and not symbols(g.items[0]) and a.kind == "equation"


def _as_difference(assign: Shape) -> Node | None:
    return _difference(("s", assign.name), assign.items[0]) if assign.name and "(" not in assign.name else None


def _pairwise(a: Shape, g: Shape) -> bool:
    return len(a.items) == len(g.items) and all(_alike(x, y) for x, y in zip(a.items, g.items, strict=True))


def _covers(a: tuple[Shape, ...], g: tuple[Shape, ...]) -> bool:
    return all(any(_safe(x, y) for y in g) for x in a)


def _matched(a: tuple[Shape, ...], g: tuple[Shape, ...]) -> bool:
    """Each of one with exactly one of the other."""
    left = list(g)
    for x in a:
        hit = next((i for i, y in enumerate(left) if _safe(x, y)), None)
        if hit is None:
            return False
        left.pop(hit)
    return not left


def _safe(x: Shape, y: Shape) -> bool:
    """Two members of sets; where one has no value they differ."""
    try:
        return _alike(x, y)
    except Undefined:
        return False
