"""A task from a table: JSON lines, Parquet, or a data set of the `datasets` package, with named columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from keel.errors import KeelError, nearest
from keel.tasks.grading import EXTRACT, WRITE, grading_of
from keel.tasks.task import CHECKED, PromptTask, held_out, split_number
from keel.types import Prompt

Row = Mapping[str, Any]
__all__ = ["EXTRACT", "WRITE", "datasets", "jsonl", "parquet", "read_datasets", "read_jsonl", "read_parquet", "table"]


def jsonl(variant: str, **options: str) -> PromptTask:
    """Spec "jsonl:PATH?prompt=COLUMN&answer=COLUMN": one JSON object a line. Options as in `table`."""
    return table(f"jsonl:{variant}", lambda path: read_jsonl(_file(path, "jsonl")), variant, **options)


def parquet(variant: str, **options: str) -> PromptTask:
    """Spec "parquet:PATH?prompt=COLUMN&answer=COLUMN": one Parquet file. Options as in `table`."""
    return table(f"parquet:{variant}", lambda path: read_parquet(_file(path, "parquet")), variant, **options)


def datasets(variant: str, split: str = "train", test_split: str = "", config: str = "", **options: str) -> PromptTask:
    """Spec "datasets:NAME?prompt=COLUMN&answer=COLUMN": a hub name, or a folder that `datasets` wrote or can read.

    Args:
        split, test_split: of the data set; without a test split, one is taken from `split` by hash.
        config: the data set's configuration, if it has several.
    """

    def read(which: str) -> Iterable[Row]:
        return read_datasets(variant, which, config)

    return table(f"datasets:{variant}", read, split, test=test_split, **options)


def table(
    name: str,
    read: Callable[[str], Iterable[Row]],
    source: str,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    answer_after: str = "",
    extract: str = "auto",
    suffix: str = "",
    test: str = "",
    grader: str = "exact",
    form: str = "",
    solution: str = "",
    **grading: str,
) -> PromptTask:
    """A task from rows.

    Args:
        read: rows of a source (a path, a split).
        source, test: where training and held-out rows come from. Without `test`, one row of eight is held out, by a
            hash of its prompt, so that equal prompts stay together.
        prompt, answer: names of columns.
        answer_after: the gold answer is what follows this text in its column (GSM8K: "####").
        extract: where a completion's answer is looked for: "number" (the last), "line" (the last), "tag"
            (<answer>…</answer>), "marker" (the last line "A:…"), "text" (all of it), or "auto" (`exact.answer_in`).
        suffix: written after every prompt.
        grader: "exact" compares character for character; "answer" tells whether two answers say the same (`keel.rewards.answer`),
            finds a completion's answer by itself, and looks at every gold answer on loading; "code" runs programs against the
            tests in the answer's column (`keel.rewards.code`); "judge" asks a model by a rubric (`keel.rewards.judge`), and
            `answer=` (empty) then means that there is no gold answer. "answer,judge*0.5" is a weighted sum.
        form: "tags:think,answer" or "regex:…": a completion without this form earns nothing (`keel.rewards.format`).
        solution: of "code", the name of a column with programs that pass; some of them are run on loading.
        grading: options of the grader (`keel.tasks.grading`), for instance rubric, base_url and model of a judge.

    Raises:
        KeelError: a file, a column or a value is missing, or cannot be read.
    """
    graded = grading_of(name, grader, extract, form, grading)

    def prompts(where: str, kind: str) -> list[Prompt]:
        rows = enumerate(read(where))
        columns = (prompt, answer, solution) if grader == "code" else (prompt, answer, "")
        return [_prompt(f"{kind}/{i}", row, columns, answer_after, suffix, where) for i, row in rows]

    rows = prompts(source, "row")
    train, held = (rows, prompts(test, "test")) if test else _split(rows)
    graded.check([*train, *held])
    checked = CHECKED if graded.checked is None else graded.checked
    if grader == "code" and not solution:
        checked = 0
    return PromptTask(name, train, held, graded.grade, graded.write_gold, graded.own_gold_only, checked)


def _split(rows: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Train and test by a hash of the prompt; of a table so small that none is held out, the one with the lowest."""
    chosen = {p.text for p in rows if held_out(p.text)} or {min((p.text for p in rows), key=split_number, default="")}
    return [p for p in rows if p.text not in chosen], [p for p in rows if p.text in chosen]


def _prompt(id: str, row: Row, columns: tuple[str, str, str], answer_after: str, suffix: str, where: str) -> Prompt:
    prompt, answer, solution = columns
    text = _cell(row, prompt, "prompt", id, where)
    gold = _cell(_with_text(row, answer), answer, "answer", id, where) if answer else ""
    more = {"solution": _cell(row, solution, "solution", id, where)} if solution else {}
    if answer_after:
        if answer_after not in gold:
            raise KeelError(
                f"Row {id!r} of {where!r}: its answer has no {answer_after!r}, after which gold was to stand: "
                f"{gold[-80:]!r}. Mend the row, or leave the option answer_after out."
            )
        gold = gold.rsplit(answer_after, 1)[1]
    return Prompt(id=id, text=text + suffix, answer=gold.strip(), data={"row": id} | more)


def _with_text(row: Row, column: str) -> Row:
    """A list of tests, as data sets of programs have it, as the text of that list."""
    return {**row, column: json.dumps(row[column])} if isinstance(row.get(column), list | dict) else row


def _cell(row: Row, column: str, option: str, id: str, where: str) -> str:
    """One cell as text; whole numbers are written plainly."""
    if column not in row:
        raise KeelError(
            f"Row {id!r} of {where!r} has no column {column!r}: {nearest(column, map(str, row))}It has "
            f"{', '.join(map(str, row)) or 'no columns'}. Name the right one with the option {option}=COLUMN."
        )
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or not str(value).strip():
        raise KeelError(
            f"Row {id!r} of {where!r} has {value!r} in column {column!r}. Expected a text or a number; mend the row, or drop it."
        )
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _file(path: str, kind: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise KeelError(
            f"There is no file {path!r} for the task: {nearest(file.name, siblings)}Expected {kind}:PATH, relative to "
            f"the folder that keel runs in or absolute."
        )
    return file


def read_jsonl(file: Path) -> list[Row]:
    """The objects of a file with one JSON object a line; empty lines are skipped.

    Raises:
        KeelError: a line is no JSON object, or there is none; says which line.
    """
    rows = []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            where = f"Line {number} of {str(file)!r}"
            raise KeelError(f"{where} is no JSON: {error}. Expected one object a line.") from error
        if not isinstance(row, dict):
            raise KeelError(f"Line {number} of {str(file)!r} is a {type(row).__name__}. Expected a JSON object.")
        rows.append(row)
    if not rows:
        raise KeelError(f"File {str(file)!r} has no rows. Expected one JSON object a line.")
    return rows


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise KeelError(f"File {str(file)!r} is no UTF-8 text: {error}. Expected JSON lines in UTF-8.") from error


def read_parquet(file: Path) -> list[Row]:
    """The rows of a Parquet file.

    Raises:
        KeelError: pyarrow is missing, or the file is no Parquet file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise KeelError(
            f"Reading {str(file)!r} needs pyarrow, which cannot be imported ({error}). Install it: pip install 'keel-rl[data]'."
        ) from error
    try:
        return parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise KeelError(f"File {str(file)!r} cannot be read as Parquet: {error} Expected a whole Parquet file.") from error


def read_datasets(name: str, split: str, config: str = "") -> Iterable[Row]:
    """The rows of one split of a data set, as the `datasets` package loads it.

    Raises:
        KeelError: the package is missing, or it cannot load that.
    """
    try:
        import datasets as package
    except ImportError as error:
        raise KeelError(
            f"Task 'datasets:{name}' needs the package datasets, which cannot be imported ({error}). Install it: pip "
            f"install 'keel-rl[data]'."
        ) from error
    try:
        if (Path(name) / "state.json").is_file():
            return package.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").is_file():
            return package.load_from_disk(name)[split]
        return package.load_dataset(name, config or None, split=split)
    except Exception as error:  # hub, network, file and format errors are of many kinds, and differ between versions
        reason = next(iter(str(error).strip().splitlines()), "")
        raise KeelError(
            f"Data set {name!r} (split {split!r}) could not be loaded: {type(error).__name__}: {reason} Expected a hub "
            f"name, or a folder that the datasets package can read. Check the name, the split and the network."
        ) from error
