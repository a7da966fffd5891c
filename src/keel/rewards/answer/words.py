"""Answers in words: numbers, letters of a multiple choice, sets that have a name."""

from __future__ import annotations

import re

from keel.rewards.answer.clean import plain_text

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {word: str(i) for i, word in enumerate(_SMALL)} | {
    word + (f" {_SMALL[i]}" if i else ""): str(10 * tens + i) for tens, word in enumerate(_TENS, 2) for i in range(10)
}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
FRACTIONS = {
    f"{word} {part}{s}": f"{i}/{size}"
    for i, word in enumerate(_SMALL[:10])
    for part, size in _PARTS.items()
    for s in ("", "s")
    if i
}
NAMED = {
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions", "empty set"), "\\emptyset"),
    **dict.fromkeys(("all real numbers", "all reals", "set of all real numbers", "real numbers"), "\\mathbb{R}"),
    **dict.fromkeys(("one half", "half"), "1/2"), **dict.fromkeys(("infinity", "positive infinity"), "\\infty"),
    "negative infinity": "-\\infty",
}  # fmt: skip
NUMBERS |= {
    f"{word} {name}": str(int(count) * size)
    for word, count in [*NUMBERS.items(), ("a", "1")]
    for name, size in (("hundred", 100), ("thousand", 1000), ("million", 10**6), ("billion", 10**9))
    if word != "zero"
}
_CLOCK = re.compile(r"\d{1,2}(?::\d\d)?\s*[ap]\.?m\.?", re.I)
_LETTER = re.compile(r"(?:([A-J])|\(\s*([A-Ja-j])\s*\))\s*[.:]?$")
_CHOSEN = re.compile(
    r"(?:(?:option|choice)\s+)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z]))\s*(?:[.:)]?$|(?:[.:)]|(?<=\)))\s+(\S.*)$)", re.I | re.S
)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z'])(?:[B-J]|\([A-Ja-j]\)|[A-Ja-j]\))(?![A-Za-z'])|\b(?:or|and)\b\s*\(?[A-J]\b")


def named(text: str) -> str:
    """Mathematics for words that stand for it: "twelve" → "12", "no solution" → "\\emptyset"; else the text."""
    if _CLOCK.fullmatch(text):
        return re.sub(r"[\s.]", "", text.lower())
    words = plain_text(text) if text[:1].isalpha() and len(text) < 60 else ""
    sign, _, rest = words.partition(" ")
    if sign in ("negative", "minus") and (rest in NUMBERS or rest.isdigit()):
        return "-" + NUMBERS.get(rest, rest)
    return NUMBERS.get(words) or FRACTIONS.get(words) or NAMED.get(words) or text


def letter(gold: str) -> str:
    """The letter of a gold answer that is one of a multiple choice, in capitals; "" where it is none."""
    match = _LETTER.match(gold)
    return (match[1] or match[2]).upper() if match else ""


def chosen(answer: str) -> str:
    """The one letter that an answer chooses, in capitals: "(B)", "b.", "Option B", "B) 12"; "" where it chooses none or several."""
    match = _CHOSEN.match(answer)
    if match is None or match[3] and _OTHER_LETTER.search(match[3]):
        return ""
    return (match[1] or match[2]).upper()
