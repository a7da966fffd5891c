"""The form of a completion, told by a function text → what is wrong with it ("" is nothing). For `compose.Gated`."""

from __future__ import annotations

import re
from collections.abc import Callable

from keel.errors import KeelError

Form = Callable[[str], str]


def tagged(*names: str) -> Form:
    """<a>…</a><b>…</b>: each tag once, in this order, something in each, and nothing but space around them.

    Raises:
        KeelError: no names, one twice, or one that is no word.
    """
    if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise KeelError(f"Tags are {names}. Expected different words, such as 'think' and 'answer'.")

    def form(text: str) -> str:
        rest = text
        for name in names:
            opening, closing = f"<{name}>", f"</{name}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return f"it has {text.count(opening)} {opening} and {text.count(closing)} {closing}, expected one each"
            before, _, after = rest.partition(opening)
            inside, closed, rest = after.partition(closing)
            if before.strip() or not closed:
                return f"{opening} is not in its place"
            if not inside.strip():
                return f"nothing stands in {opening}"
        return "something stands after the last tag" if rest.strip() else ""

    return form


def matches(pattern: str) -> Form:
    """The whole text matches a regular expression, in which a dot is any character.

    Raises:
        KeelError: the expression is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as fault:
        raise KeelError(f"The form {pattern!r} is no regular expression: {fault}. Mend it, or name tags instead.") from None
    return lambda text: "" if compiled.fullmatch(text) else f"it does not match {pattern!r}"


def written(spec: str, inside: str) -> str | None:
    """A text of that form around this one, which stands in the last tag; None where the form does not say how to write it."""
    kind, _, rest = spec.partition(":")
    if kind != "tags":
        return None
    *others, last = (name.strip() for name in rest.split(","))
    bare = inside.removeprefix(f"<{last}>").removesuffix(f"</{last}>")
    return "".join(f"<{name}>…</{name}>" for name in others) + f"<{last}>{bare}</{last}>"


def form_of(spec: str) -> Form:
    """A form from a text: "tags:think,answer" or "regex:…".

    Raises:
        KeelError: neither.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tags":
        return tagged(*(name.strip() for name in rest.split(",")))
    if kind == "regex":
        return matches(rest)
    raise KeelError(f"The form is {spec!r}. Expected tags:think,answer or regex:EXPRESSION.")
