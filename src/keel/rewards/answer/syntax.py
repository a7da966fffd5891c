"""Cleaned text → a tree. A node is a tuple whose first item says what it is.

("n", Fraction) number · ("s", name) symbol · ("c", "pi" | "e" | "i" | "inf") · ("+" | "*", a, b, …) · ("/", a, b) · ("^", a, b)
("root", n, a) · ("f", name, a, …) · ("log", base or None, a) · ("±", sign, a, b)
("list", joint, items) · ("tuple", opening, closing, items) · ("set", items) · ("such", symbol, condition) · ("matrix", rows)
("union", parts) · ("minus", a, b) · ("field", "R") · ("rel", operators, sides)
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NoReturn

from keel.rewards.answer import lexer
from keel.rewards.answer.errors import NotMath, Unsupported
from keel.rewards.answer.lexer import Token, tokenize

Node = tuple[Any, ...]
DEEPEST = 40


def parse(text: str, *, split_thousands: bool = False) -> Node:
    """The tree of a cleaned text.

    Args:
        split_thousands: read the comma of "1,234" as one between two numbers; inside brackets it always is.

    Raises:
        NotMath: broken, or words. Unsupported: a construct that is not known here.
    """
    if not text.strip():
        raise NotMath("nothing there")
    if "\\frac{d}{d" in text:
        raise Unsupported("a derivative")
    known = text in lexer.CONSTANTS or text in lexer.GREEK or set(text) <= lexer.VARIABLES
    if text.isalpha() and len(text) > 1 and not known:
        raise NotMath("a word")
    parser = _Parser(tokenize(text), split_thousands)
    node = parser.statement()
    if parser.at < len(parser.tokens):
        parser.fail()
    return node


class _Parser:
    """Recursive descent. Every method reads from `at` on and leaves `at` after what it read."""

    def __init__(self, tokens: list[Token], split_thousands: bool):
        self.tokens, self.at, self.depth, self.bars, self.split = tokens, 0, 0, 0, split_thousands
        self._split_numbers()

    def _split_numbers(self) -> None:
        """Commas between digits: thousands at the top, separators inside brackets."""
        out: list[Token] = []
        depth = 0
        for i, token in enumerate(self.tokens):
            braced = (
                token.text == "{" and i > 0 and self.tokens[i - 1].text not in ("^", "_", "}") and self.tokens[i - 1].kind != "cmd"
            )
            depth += (token.text in ("(", "[", "\\{", "\\langle")) + braced - (token.text in (")", "]", "\\}", "\\rangle"))
            if token.kind == "num" and "," in token.text:
                if self.split or depth > 0:
                    for part in token.text.split(","):
                        out += (
                            [Token("op", ",", False), Token("num", part, False)]
                            if out and out[-1].kind == "num"
                            else [Token("num", part, False)]
                        )
                    continue
                token = Token("num", token.text.replace(",", ""), token.spaced)
            out.append(token)
        self.tokens = out

    # ---- looking ----
    def peek(self, ahead: int = 0) -> str:
        i = self.at + ahead
        return self.tokens[i].text if i < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        text = self.peek()
        if not text or (expected and text not in expected):
            self.fail()
        self.at += 1
        return text

    def fail(self) -> NoReturn:
        text = self.peek()
        if text[1:] in lexer.FOR_THE_WORKER:
            raise Unsupported(f"{text} is not known here")
        raise NotMath(f"{text!r} is not expected there" if text else "it ends too early")

    # ---- lists, relations, sets ----
    def statement(self) -> Node:
        """Items between commas, "and", "or"; one alone stands for itself."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotMath("too many brackets inside each other")
        items, joint = [self.relation()], ""
        while self.peek() in lexer.JOINTS:
            found = lexer.JOINTS[self.take()]
            if found == "," and self.peek() in ("and", "or"):
                found = self.take()
            if joint == "or" and found == "and" or joint == "and" and found == "or":
                raise NotMath("mixes and with or")
            joint = found if found != "," or not joint else joint
            items.append(self.relation())
        self.depth -= 1
        return items[0] if not joint else ("list", joint, tuple(items))

    def relation(self) -> Node:
        sides, operators = [self.union()], []
        while self.peek() in lexer.RELATIONS:
            operators.append(lexer.RELATIONS[self.take()])
            sides.append(self.union())
        return sides[0] if not operators else ("rel", tuple(operators), tuple(sides))

    def union(self) -> Node:
        parts = [self.sum()]
        while self.peek() in ("\\cup", "\\setminus"):
            if self.take() == "\\cup":
                parts.append(self.sum())
            else:
                left = parts[0] if len(parts) == 1 else ("union", tuple(parts))
                parts = [("minus", left, self.sum())]
        return parts[0] if len(parts) == 1 else ("union", tuple(parts))

    # ---- arithmetic ----
    def sum(self) -> Node:
        terms, node = [], None
        while True:
            sign = self.peek()
            if sign in ("+", "-", "\\pm", "\\mp"):
                self.at += 1
                if self.peek() in ("+", "-", "\\pm", "\\mp"):
                    self.fail()
            elif terms or node is not None:
                break
            term = self.product()
            if sign in ("\\pm", "\\mp"):
                left = ("+", *terms) if terms else ("n", Fraction(0))
                terms = [("±", 1 if sign == "\\pm" else -1, left, term)]
            else:
                terms.append(negative(term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Node:
        node = self.power()
        bare = node[0] == "n" and self.tokens[self.at - 1].kind == "num"
        while True:
            text = self.peek()
            if text == "*":
                self.at += 1
                node, bare = ("*", node, self.signed()), False
            elif text == "/":
                self.at += 1
                node, bare = ("/", node, self.signed()), False
            elif self.starts_factor():
                mixed, number = bare and text == "\\frac", self.kind() == "num"
                right = self.power()
                if mixed and right[0] == "/" and right[1][0] == right[2][0] == "n" and node[1].denominator == 1:
                    node = ("+", node, right)
                elif number or mixed or {node[0], right[0]} & lexer.SHAPES:
                    raise NotMath("two numbers side by side")
                else:
                    node = ("*", node, right)
                bare = False
            else:
                return node

    def signed(self) -> Node:
        """A factor after an operator; it may have a sign of its own."""
        if self.peek() == "-":
            self.at += 1
            return negative(self.power())
        return self.power()

    def starts_factor(self) -> bool:
        text, kind = self.peek(), self.kind()
        if kind == "word":
            return text not in lexer.JOINTS
        if kind == "cmd":
            return text not in lexer.RELATIONS and text not in lexer.JOINTS and text not in lexer.CLOSING
        return kind == "num" or text in ("(", "[", "{") or text == "|" and not self.bars

    def power(self) -> Node:
        node = self.postfix(self.primary())
        if self.peek() in ("^", "**"):
            self.take()
            if self.peek() == "-":
                self.at += 1
                return ("^", node, negative(self.postfix(self.primary())))
            exponent = self.postfix(self.primary())
            if self.peek() in ("^", "**"):
                self.take()
                exponent = ("^", exponent, self.postfix(self.primary()))
            return self.postfix(("^", node, exponent))
        return node

    def postfix(self, node: Node) -> Node:
        while self.peek() in ("!", "%", "°"):
            mark = self.take()
            if mark == "!":
                node = ("f", "factorial", node)
            else:
                by = ("n", Fraction(1, 100)) if mark == "%" else ("/", ("c", "pi"), ("n", Fraction(180)))
                node = ("*", node, by)
        return node

    # ---- the smallest parts ----
    def primary(self) -> Node:
        text, kind = self.peek(), self.kind()
        if kind == "num":
            self.at += 1
            if self.peek() == "_":
                raise NotMath("a number in another base")
            return ("n", Fraction(text))
        if kind == "word":
            return self.word(self.take())
        if text in lexer.OPENERS and text != "<":
            return self.bracketed()
        if text == "|":
            return self.absolute()
        if kind == "cmd":
            return self.command(self.take()[1:])
        self.fail()

    def bracketed(self) -> Node:
        opening = self.take()
        closers = lexer.OPENERS[opening]
        if self.peek() in closers:
            closing, items = self.take(), ()
            if opening not in ("\\{", "{"):
                raise NotMath("empty brackets")
            return ("set", items)
        inside = self.statement()
        if self.peek() in ("\\mid", ":") and opening == "\\{":
            self.at += 1
            condition = self.statement()
            self.take("\\}")
            return ("such", inside, condition)
        closing = self.take(*closers)
        items = inside[2] if inside[0] == "list" else (inside,)
        if inside[0] == "list" and inside[1] != ",":
            raise NotMath("and/or inside brackets")
        if opening == "\\{" or opening == "{" and len(items) > 1:
            return ("set", items)
        if len(items) == 1 and opening != "\\langle" and (opening, closing) in (("(", ")"), ("[", "]"), ("{", "}")):
            return inside
        return ("tuple", "(" if opening == "\\langle" else opening, ")" if closing == "\\rangle" else closing, items)

    def absolute(self) -> Node:
        self.take("|")
        self.bars += 1
        inside = self.sum()
        self.bars -= 1
        self.take("|")
        return ("f", "abs", inside)

    def group(self) -> Node:
        """What a command applies to: {…}, or the next single thing."""
        if self.peek() != "{":
            return self.primary()
        self.take("{")
        inside = self.sum()
        self.take("}")
        return inside

    def word(self, text: str) -> Node:
        if text in lexer.FUNCTIONS or text in ("log", "lg", "sqrt", "cbrt"):
            return self.function(text)
        if text in lexer.CONSTANTS:
            return ("c", lexer.CONSTANTS[text])
        if text in lexer.GREEK or len(text) == 1:
            return self.symbol(text)
        if text.lower() in lexer.ENGLISH or len(text) > 3 or text in lexer.JOINTS:
            raise NotMath(f"the word {text!r}")
        factors = [("c", lexer.CONSTANTS[c]) if c in lexer.CONSTANTS else ("s", c) for c in text[:-1]]
        last = self.symbol(text[-1]) if text[-1] not in lexer.CONSTANTS else ("c", lexer.CONSTANTS[text[-1]])
        if self.peek() in ("^", "**"):  # xy^2 is x·y²
            self.at += 1
            last = ("^", last, self.postfix(self.primary()))
        return ("*", *factors, last)

    def symbol(self, name: str) -> Node:
        """A symbol with its subscript and primes: x_1, a_{n}, f'."""
        if self.peek() == "_":
            self.at += 1
            if self.peek() == "{":
                begun = self.at + 1
                while self.peek() not in ("}", ""):
                    self.at += 1
                name += "_" + "".join(token.text for token in self.tokens[begun : self.at])
                self.take("}")
            else:
                name += "_" + self.take()
        while self.peek() == "'":
            name += self.take()
        return ("s", name)

    def command(self, name: str) -> Node:
        if name in lexer.FUNCTIONS or name in ("log", "lg"):
            return self.function(name)
        if name in lexer.CONSTANTS:
            return ("c", lexer.CONSTANTS[name])
        if name in lexer.GREEK:
            return self.symbol(name)
        known = {"frac": self.fraction, "sqrt": self.root, "binom": self.binomial, "begin": self.matrix,
        "emptyset": lambda: ("set", ()),
                 "mathbb": self.field, "lfloor": lambda: self.rounded("floor", "\\rfloor"),
                 "lceil": lambda: self.rounded("ceil", "\\rceil")}  # fmt: skip
        if name not in known:
            self.at -= 1
            self.fail()
        return known[name]()

    def fraction(self) -> Node:
        top = self.group()
        return ("/", top, self.group())

    def binomial(self) -> Node:
        top = self.group()
        return ("f", "binomial", top, self.group())

    def field(self) -> Node:
        name = self.group()
        if name[0] != "s" or name[1] not in lexer.FIELDS:
            raise Unsupported("a set of numbers")
        return ("field", name[1])

    def rounded(self, name: str, closing: str) -> Node:
        inside = self.sum()
        self.take(closing)
        return ("f", name, inside)

    def root(self) -> Node:
        degree = 2
        if self.peek() == "[":
            self.at += 1
            if self.kind() != "num" or not self.peek().isdigit() or not 2 <= int(self.peek()[:4]) <= 100:
                raise Unsupported("a root of that degree")
            degree = int(self.take())
            self.take("]")
        if self.peek() == "(":
            return ("root", degree, self.primary())
        return ("root", degree, self.group())

    def function(self, name: str) -> Node:
        """sin x, \\sin^2 x, \\log_2 8, sqrt(2), max(1, 2)."""
        base = power = None
        if name == "log" and self.peek() == "_":
            self.at += 1
            base = self.group()
        if self.peek() in ("^", "**") and name not in ("sqrt", "cbrt"):
            self.at += 1
            power = self.group()
            if power == ("n", Fraction(-1)):
                raise Unsupported("an inverse function")
        arguments = self.arguments()
        if name in ("log", "lg"):
            node: Node = ("log", ("n", Fraction(10)) if name == "lg" else base, *arguments)
        elif name in ("sqrt", "cbrt"):
            node = ("root", 2 if name == "sqrt" else 3, *arguments)
        else:
            node = ("f", lexer.SAME.get(name, name), *arguments)
        if len(arguments) != 1 and name not in ("gcd", "lcm", "max", "min"):
            raise NotMath(f"{name} of several things")
        return node if power is None else ("^", node, power)

    def arguments(self) -> tuple[Node, ...]:
        if self.peek() in ("(", "[", "{"):
            opening = self.take()
            inside = self.statement()
            self.take(*lexer.OPENERS[opening][:1])
            return inside[2] if inside[0] == "list" else (inside,)
        node = self.power()
        while self.kind() in ("num", "word") or self.kind() == "cmd" and self.peek()[1:] in {*lexer.GREEK, "pi", "frac", "sqrt"}:
            if self.peek() in lexer.FUNCTIONS or self.peek() in lexer.JOINTS or self.peek() == "log":
                break
            node = ("*", node, self.power())
        return (node,)

    def matrix(self) -> Node:
        self.take("{")
        name = self.take()
        self.take("}")
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "cases"):
            raise Unsupported(f"the environment {name}")
        if name == "array" and self.peek() == "{":
            while self.take() != "}":
                pass
        rows: list[list[Node]] = [[]]
        while True:
            rows[-1].append(self.relation())
            mark = self.take("&", "\\\\", "\\end")
            if mark == "\\\\" and self.peek() == "\\end":
                mark = self.take()
            if mark == "\\end":
                break
            if mark == "\\\\":
                rows.append([])
        self.take("{")
        self.take(name)
        self.take("}")
        if len({len(row) for row in rows}) != 1:
            raise NotMath("rows of different lengths")
        if name == "cases":
            if len(rows[0]) > 1 or any(row[0][0] != "rel" for row in rows):
                raise Unsupported("a function in several cases")
            return ("list", ",", tuple(row[0] for row in rows))
        return ("matrix", tuple(map(tuple, rows)))


def negative(node: Node) -> Node:
    """−node."""
    return ("n", -node[1]) if node[0] == "n" else ("*", ("n", Fraction(-1)), node)
