"""The simple exact-answer reward: find the answer in a completion, compare it with gold."""

from __future__ import annotations

import re
from collections.abc import Callable

from keel.types import Prompt, Score

Extract = Callable[[str], str | None]
TAIL = 4096  # characters at a completion's end in which an answer is looked for
_NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
OPEN, CLOSE = "<answer>", "</answer>"


def after_marker(marker: str = "A:") -> Extract:
    """What follows the last line that begins with the marker, up to the end of the text; None without such a line.

    Whatever is written after the answer is part of it, so an answer cannot be hidden in a list of guesses.
    """

    def extract(text: str) -> str | None:
        lines = text[-TAIL:].rstrip().split("\n")
        for i in range(len(lines) - 1, -1, -1):
            if lines[i].startswith(marker):
                return "\n".join(lines[i:])[len(marker) :].strip()
        return None

    return extract


def last_line(text: str) -> str | None:
    """The last line that is not empty."""
    lines = text[-TAIL:].rstrip().split("\n")
    return lines[-1].strip() or None


def last_number(text: str) -> str | None:
    """The last number of a text in plain digits: "it is -1,234.50." → "-1234.50"; the 3 of "5-3" has no sign."""
    found = _NUMBER.findall(text[-TAIL:])
    return plain_number(found[-1]) if found else None


def in_tag(text: str) -> str | None:
    """What stands in the last <answer>…</answer> of a text."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    return None if start < 0 else text[start + len(OPEN) : end].strip()


def plain_number(text: str) -> str:
    """A number as int() and float() read it: no thousands separators, no plus, an ASCII minus."""
    return text.strip().replace(",", "").replace("−", "-").removeprefix("+")


def numeric(answer: str) -> bool:
    """Whether an answer is one number in plain digits."""
    return plain_number(answer) == answer and _NUMBER.fullmatch(answer) is not None


def answer_in(text: str, gold: str) -> str | None:
    """What a completion answers when nobody said where: what stands in its last <answer> tag; without one the last
    number where the gold answer is a number, the whole text where gold has several lines, and else the last line.
    """
    tagged = in_tag(text)
    if tagged is not None:
        return tagged
    if numeric(gold.strip()):
        return last_number(text)
    return text.strip() if "\n" in gold.strip() else last_line(text)


def exact_anywhere(prompt: Prompt, text: str) -> Score:
    """The grader `exact` with `answer_in`, which looks at the kind of gold answer."""
    return exact(lambda said: answer_in(said, prompt.answer))(prompt, text)


def exact(extract: Extract) -> Callable[[Prompt, str], Score]:
    """A grader: 1 where the extracted answer equals the gold answer character for character, apart from spaces at its
    ends; else 0."""

    def grade(prompt: Prompt, text: str) -> Score:
        answer = extract(text)
        if answer is None:
            return Score(0.0, reason="no answer found")
        right = answer.strip() == prompt.answer.strip()
        return Score(float(right), right, said=answer)

    return grade
