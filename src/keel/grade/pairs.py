"""Answers to be graded, from a JSONL: a text, its gold answer and, where somebody judged it, a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.errors import KeelError, nearest
from keel.types import Prompt

COLUMNS = {  # what each role's column is usually called, the likeliest first
    "answer": ("completion", "response", "output", "prediction", "candidate", "answer", "text"),
    "gold": ("gold", "gold_answer", "reference", "target", "expected", "ground_truth", "solution", "answer"),
    "label": ("label", "is_correct", "human", "correct", "right"),
    "prompt": ("prompt", "question", "problem", "input"),
    "class": ("class", "category", "kind", "type"),
}
NONE, NO_GOLD = "none", "(no gold answer)"  # what stands for the column, and for the answer, where there is none
SAYS = {
    **dict.fromkeys(("true", "yes", "right", "correct", "pass", "passed", "1", "1.0"), 1.0),
    **dict.fromkeys(("false", "no", "wrong", "incorrect", "fail", "failed", "0", "0.0"), 0.0),
}


@dataclass(frozen=True)
class Pair:
    """One answer.

    Args:
        prompt: the question, with the gold answer that a grader compares with.
        text: what is graded.
        label: how right it truly is: 1 right, 0 wrong, between for a rubric's levels; None where nobody said.
        kind: its class, such as "near_miss"; "" without one.
        row: its line in the file, from 1.
    """

    prompt: Prompt
    text: str
    label: float | None
    kind: str
    row: int


@dataclass(frozen=True)
class Pairs:
    """The answers of one file.

    Args:
        columns: role → the column that it was read from.
        left_out: line → why it could not be read.
    """

    name: str
    rows: tuple[Pair, ...]
    columns: Mapping[str, str]
    left_out: Mapping[int, str]

    @property
    def labelled(self) -> int:
        return sum(pair.label is not None for pair in self.rows)

    @property
    def levels(self) -> tuple[float, ...]:
        """Distinct labels, rising."""
        return tuple(sorted({pair.label for pair in self.rows if pair.label is not None}))


def read_pairs(path: str | Path, **columns: str) -> Pairs:
    """The answers of a JSONL file.

    Args:
        columns: role → its column, for roles "answer", "gold", "label", "prompt" and "class"; the others are found by their
            usual names, the last three may be missing.

    Raises:
        KeelError: no such file or column, or not one row can be read.
    """
    from keel.tasks.table import read_jsonl

    file = Path(path).expanduser()
    if not file.is_file():
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise KeelError(f"There is no file {str(path)!r}. {nearest(file.name, near).capitalize()}Expected one JSON object a line.")
    return pairs_of(read_jsonl(file), file.name, **columns)


def pairs_of(rows: Sequence[Mapping[str, Any]], name: str = "rows", **columns: str) -> Pairs:
    """The answers among rows that are at hand. Arguments as of `read_pairs`."""
    chosen = choose_columns(rows, {role: column for role, column in columns.items() if column})
    if chosen["gold"] == NONE and not any(NONE in row for row in rows):
        rows = [{**row, NONE: NO_GOLD} for row in rows]
    read, left_out = [], {}
    for number, row in enumerate(rows, 1):
        try:
            read.append(_pair(number, row, chosen))
        except ValueError as why:
            left_out[number] = str(why)
    if not read:
        number, why = next(iter(left_out.items()), (1, "the file is empty"))
        raise KeelError(f"Not one row of {name!r} can be graded; row {number}: {why}. Expected a text and a gold answer in each.")
    return Pairs(name, tuple(read), chosen, left_out)


def choose_columns(rows: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, str]:
    """Which column plays which role: as given, else the likeliest by its name.

    A run's own `correct` is what its reward said, not a label, so it is taken for one only when asked.
    """
    present = list(dict.fromkeys(key for row in rows for key in row))
    for role, column in given.items():
        if column not in present and (role, column) != ("gold", NONE):
            raise KeelError(f"No row has the column {column!r} ({role}): {nearest(column, present)}There are {', '.join(present)}.")
    chosen = dict(given)
    for role, names in COLUMNS.items():
        free = [name for name in names if name in present and name not in chosen.values()]
        if role == "label" and "reward" in present:
            free = [name for name in free if name not in ("correct", "right")]
        if role not in chosen and free:
            chosen[role] = free[0]
    for role in ("answer", "gold"):
        if role not in chosen:
            raise KeelError(
                f"No column of {', '.join(present) or 'an empty file'} looks like the {role}. Expected the texts to grade and the "
                f"gold answers that they are compared with. Name the column with --{role} COLUMN; for a judge that needs no gold "
                f"answers, --gold none."
            )
    return chosen


def level_of(value: Any) -> float | None:
    """A label as a number in [0, 1]: true and false, 1 and 0, words such as "right", a rubric's levels; None for none."""
    if value is None or value == "":
        return None
    if isinstance(value, bool | int | float):
        level = float(value)
    else:
        level = SAYS.get(str(value).strip().lower(), float("nan"))
        level = _as_number(str(value)) if level != level else level
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"its label is {value!r}; expected true, false or a level from 0 to 1")
    return level


def clusters(pairs: Iterable[Pair]) -> list[str]:
    """What makes answers depend on one another: the question and its gold answer."""
    return [f"{pair.prompt.text}\0{pair.prompt.answer}" for pair in pairs]


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _pair(number: int, row: Mapping[str, Any], columns: Mapping[str, str]) -> Pair:
    text, gold = (_text(row.get(columns[role]), columns[role]) for role in ("answer", "gold"))
    if not gold.strip():
        raise ValueError(f"its gold answer ({columns['gold']!r}) is empty")
    question = row.get(columns.get("prompt", ""), "")
    prompt = Prompt(id=f"row/{number}", text=question if isinstance(question, str) else str(question), answer=gold, data=dict(row))
    kind = row.get(columns.get("class", ""))
    named = "" if kind is None else " ".join(str(kind).encode("utf-8", "replace").decode().split())
    return Pair(prompt, text, level_of(row.get(columns.get("label", ""))), named, number)


def _text(value: Any, column: str) -> str:
    """A cell as text; whole numbers are written plainly."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise ValueError(f"{column!r} holds {value!r}; expected a text or a number")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
