"""Whether an answer and the gold answer say the same thing.

Three stages, each only for what the one before left open: plain numbers; this package's own reading (numbers, roots, symbols, sets,
intervals, equations, matrices, units, words), in exact arithmetic or to 30 digits; math-verify in a process that can
be killed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from keel.errors import KeelError
from keel.rewards.answer import words
from keel.rewards.answer.budget import renew
from keel.rewards.answer.clean import clean, plain_text, readable, squash
from keel.rewards.answer.errors import NotMath, TooLarge, Undefined, Unreadable, Unsupported
from keel.rewards.answer.exact import fold
from keel.rewards.answer.extract import find, is_marked
from keel.rewards.answer.shapes import Shape, same, shape
from keel.rewards.answer.syntax import parse
from keel.rewards.answer.units import Unit, split_unit
from keel.rewards.answer.workers import Failed, Workers
from keel.types import Score

Kind = Literal["correct", "wrong", "unscorable"]
_PLAIN = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_HALF_TURN = ("/", ("c", "pi"), ("n", Fraction(180)))


@dataclass(frozen=True)
class Verdict:
    """correct, wrong, or unscorable with a reason.

    A verdict depends on the clock only where it is unscorable: too slow, or a worker that died. What has too many digits or
    brackets is wrong, whenever and wherever it is asked.

    Args:
        kind: the verdict.
        reason: why, where it is not obvious.
        by: the stage that decided: "number", "text", "choice", "own" or "math-verify".
        said: the answer that was taken from a completion, where one was; the verdict is the same without it.
    """

    kind: Kind
    reason: str = ""
    by: str = ""
    said: str = field(default="", compare=False)

    @property
    def correct(self) -> bool:
        return self.kind == "correct"

    @property
    def score(self) -> Score:
        """1, 0, or unscorable, with the reason."""
        return Score(None if self.kind == "unscorable" else float(self.correct), self.correct, self.reason, said=self.said)


@dataclass(frozen=True)
class _Reading:
    """One side: cleaned, and parsed as far as it goes."""

    text: str
    latex: str
    unit: Unit | None = None
    shape: Shape | None = None
    split: Shape | None = None  # the other reading of "1,234": two numbers
    error: Exception | None = None

    @property
    def wordy(self) -> bool:
        return isinstance(self.error, NotMath) and bool(re.search(r"[^\W\d_]{2,}", self.text)) and "\\" not in self.text


_NONE = Verdict("unscorable", "not asked")


def equal(answer: object, gold: object, workers: Workers | None = None) -> Verdict:
    """Whether an answer says the same as the gold answer.

    Where an answer says itself where it is (a box, a tag, "answer: …") it is read there. Units may be left out; a percent
    sign may not: 50 % is 1/2 and not 50. A decimal is the number that it writes: .333 is not 1/3. Sets and lists have
    no order, tuples have.

    Args:
        answer: any object; what is no text is wrong.
        gold: the gold answer.
        workers: the pool for what is not decided here; one that all callers share unless given.

    Returns:
        never raises, whatever the texts are; comes back within the workers' bound, once it is its turn.
    """
    quick = _numbers(answer, gold)
    if quick is not None:
        return quick
    renew()
    wanted = read_gold(gold)
    renew()
    if isinstance(wanted, Verdict):
        return wanted
    try:
        text = readable(_answer_in(answer, wanted))
        return _decide(_read(text), wanted, workers)
    except Unreadable as error:
        return Verdict("wrong", f"the answer {error}", "own")
    except RecursionError:
        return Verdict("wrong", "the answer has too many brackets inside each other", "own")
    except (ArithmeticError, ValueError) as error:  # none is known; a reward that raises would end a run
        return Verdict("unscorable", f"could not be computed: {type(error).__name__}: {str(error)[:80]}", "own")


def equal_all(pairs: Sequence[tuple[object, object]], workers: Workers | None = None) -> list[Verdict]:
    """`equal` of every (answer, gold answer), in their order; the worker processes work at the same time."""
    pool = workers or shared_workers()

    def share(first: int) -> list[Verdict]:
        return [equal(answer, gold, pool) for answer, gold in pairs[first :: pool.count]]

    verdicts: list[Verdict] = [_NONE] * len(pairs)
    with ThreadPoolExecutor(pool.count, thread_name_prefix="keel-answer") as threads:
        for first, said in enumerate(threads.map(share, range(pool.count))):
            verdicts[first :: pool.count] = said
    return verdicts


def _numbers(answer: object, gold: object) -> Verdict | None:
    """The verdict on two numbers in plain digits; None for anything else."""
    if not isinstance(answer, str) or not isinstance(gold, str) or max(len(answer), len(gold)) > 1000:
        return None
    if not _PLAIN.fullmatch(answer) or not _PLAIN.fullmatch(gold):
        return None
    right = answer == gold or _number(answer) == _number(gold)
    return Verdict("correct" if right else "wrong", by="number")


def _number(text: str) -> int | Fraction:
    text = text.replace(",", "")
    return Fraction(text) if "." in text else int(text)


def _answer_in(answer: object, gold: _Reading) -> object:
    if not isinstance(answer, str) or len(answer) < 6:
        return answer
    if not (_prose(answer[:2000]) and not _prose(gold.text)) and not is_marked(answer):
        return answer
    found = find(answer)
    if found.answer is None:
        raise Unreadable(f"has none: {found.note}")
    return found.answer


def _prose(text: str) -> bool:
    """Whether a text is a sentence rather than a formula or a name."""
    words = [word for word in _WORD.findall(text) if word not in ("or", "and")]
    return len(words) > 2 or len(words) == 2 and bool({"is", "are", "was", "equals"} & set(words))


def _read(text: str) -> _Reading:
    """One side, as far as it can be read. The error says how far that was."""
    cleaned = words.named(clean(text))
    body, unit = split_unit(cleaned)
    try:
        found = shape(parse(body))
        return _Reading(cleaned, body, unit, found, _split(body))
    except (NotMath, Unsupported, TooLarge, Undefined) as error:
        return _Reading(cleaned, body, unit, error=error)


def _split(text: str) -> Shape | None:
    try:
        return shape(parse(text, split_thousands=True)) if _THOUSANDS.search(text) else None
    except (NotMath, Unsupported, TooLarge, Undefined):
        return None  # as in the numerator of 1,000/3


def read_gold(gold: object) -> _Reading | Verdict:
    """The gold answer, read once; the verdict on every answer where it cannot be read."""
    try:
        return _read_gold(readable(gold))
    except Unreadable as error:
        return Verdict("unscorable", f"the gold answer {error}")


@lru_cache(maxsize=8192)
def _read_gold(text: str) -> _Reading | Verdict:
    try:
        found = find(text) if is_marked(text) else None
        reading = _read(found.answer if found is not None and found.answer else text)
        if not reading.text:
            raise Unreadable("is empty")
        if (
            isinstance(reading.error, NotMath)
            and not reading.wordy
            and not words.letter(reading.text)
            and not _is_text(reading.text)
        ):
            raise Unreadable(f"cannot be read: {reading.error}")
        if isinstance(reading.error, TooLarge | Undefined):
            raise Unreadable(f"has no value that can be computed: {reading.error}")
        if reading.shape is not None and reading.shape.kind == "value":
            _value_of(reading.shape)
        return reading
    except (Unreadable, RecursionError) as error:
        return Verdict("unscorable", f"the gold answer {error or 'is too deep'}")


def _value_of(found: Shape) -> None:
    try:
        fold(found.items[0])
    except (TooLarge, Undefined) as error:
        raise Unreadable(f"has no value that can be computed: {error}") from error
    except Unsupported:
        pass  # for the worker


def _is_text(text: str) -> bool:
    """Letters and digits without a formula's signs: a name, a date, a time."""
    return bool(re.fullmatch(r"[\w\s.,:;'’/#&()-]+", text)) and bool(re.search(r"\w", text)) or "dots" in text


def gold_problem(gold: object, workers: Workers | None = None) -> str:
    """What is wrong with a gold answer, "" if nothing is: whether answers can be compared with it at all."""
    reading = read_gold(gold)
    if isinstance(reading, _Reading) and isinstance(reading.error, Unsupported):
        verdict = _asked(reading, reading, workers or shared_workers())
        return verdict.reason if verdict.kind == "unscorable" else ""
    return reading.reason if isinstance(reading, Verdict) else ""


# ---- deciding --------------------------------------------------------------------------------------------------------


def _decide(a: _Reading, g: _Reading, workers: Workers | None) -> Verdict:
    if not a.text:
        return Verdict("wrong", "empty", "own")
    letter = words.letter(g.text)
    if letter:
        return Verdict("correct" if words.chosen(a.text) == letter else "wrong", by="choice")
    if squash(a.text) == squash(g.text):
        return Verdict("correct", by="text")
    if g.wordy or isinstance(g.error, NotMath):
        right = g.wordy and plain_text(a.text) == plain_text(g.text)
        return Verdict("correct" if right else "wrong", by="text")
    if isinstance(a.error, NotMath):
        return Verdict("wrong", f"no formula: {a.error}", "own")
    if isinstance(a.error, TooLarge | Undefined):
        return Verdict("wrong", f"no value: {a.error}", "own")
    if a.error is None and g.error is None:
        try:
            return Verdict("correct" if _same(a, g) else "wrong", by="own")
        except (NotMath, TooLarge, Undefined) as error:
            return Verdict("wrong", f"no value: {error}", "own")
        except Unsupported:
            pass  # the worker may know
    return _asked(a, g, workers or shared_workers())


def _same(a: _Reading, g: _Reading) -> bool:
    assert a.shape is not None and g.shape is not None
    if a.unit is None or g.unit is None:
        return _either(a, g) or _half_turn(a, g)
    if a.unit.dims != g.unit.dims:
        return False
    if a.unit.factor == g.unit.factor:
        return _either(a, g)
    return same(_scaled(a.shape, a.unit.factor), _scaled(g.shape, g.unit.factor))


def _either(a: _Reading, g: _Reading) -> bool:
    """With the comma of 1,234 as one of thousands; or as one between two numbers, where the other side is a list."""
    assert a.shape is not None and g.shape is not None
    if same(a.shape, g.shape):
        return True
    lists = ("list", "set")
    if a.split is not None and g.shape.kind in lists and same(a.split, g.shape):
        return True
    return g.split is not None and a.shape.kind in lists and same(a.shape, g.split)


def _scaled(found: Shape, factor: Fraction, by: tuple = ("n", Fraction(1))) -> Shape:
    if found.kind not in ("value", "assign"):
        raise NotMath("a unit after something that is no value")
    return Shape(found.kind, (("*", found.items[0], ("n", factor), by),), found.name)


def _half_turn(a: _Reading, g: _Reading) -> bool:
    """180° is π."""
    for degrees, other in ((a, g), (g, a)):
        if degrees.unit is not None and degrees.unit.dims == (("deg", 1),) and other.unit is None:
            assert degrees.shape is not None and other.shape is not None
            return other.shape.kind == "value" == degrees.shape.kind and same(
                _scaled(degrees.shape, Fraction(1), _HALF_TURN), other.shape
            )
    return False


def _asked(a: _Reading, g: _Reading, workers: Workers) -> Verdict:
    """math-verify's verdict, from a process that may be killed."""
    try:
        said = workers.ask(_asked_as(a), _asked_as(g))
    except (Failed, OSError) as error:
        return Verdict("unscorable", f"math-verify {error}", "math-verify")
    except KeelError as error:  # not installed
        return Verdict("unscorable", str(error), "math-verify")
    if said["read"]:
        return Verdict("correct" if said["same"] else "wrong", by="math-verify")
    if said["what"] == "answer":
        return Verdict("wrong", f"no formula: {said['why']}", "math-verify")
    return Verdict("unscorable", f"math-verify cannot read the {said['what']}: {said['why']}", "math-verify")


def _asked_as(side: _Reading) -> str:
    """A rational number by its digits, which need no parser; else the formula."""
    if side.shape is not None and side.shape.kind == "value" and side.shape.items[0][0] == "n":
        return str(side.shape.items[0][1])
    return side.latex


_SHARED_LOCK = threading.Lock()
_SHARED: list[Workers] = []


def shared_workers() -> Workers:
    """The pool of two processes that all callers share; they start with the first question and end with the program."""
    with _SHARED_LOCK:
        if not _SHARED:
            _SHARED.append(Workers())
        return _SHARED[0]
