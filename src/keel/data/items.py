"""A data set as rows to be looked at one by one: what cannot be read is a finding, not an end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from keel.errors import KeelError, nearest
from keel.rewards.exact import after_marker, answer_in, in_tag
from keel.rewards.graders import get_grader
from keel.tasks.table import read_datasets, read_jsonl, read_parquet, table
from keel.tasks.task import PromptTask, held_out, unchecked_task
from keel.types import Finish, Prompt, Score

TABLES = ("jsonl", "parquet", "datasets")
PROMPTS = ("prompt", "question", "problem", "input", "instruction")
ANSWERS = ("answer", "gold", "target", "solution", "expected", "output", "reference")
Read = Callable[[str, str], str | None]  # completion, gold → the answer in it


@dataclass(frozen=True)
class Item:
    """One row.

    Args:
        prompt: as the task would ask it.
        split: "train" or "test".
        row: as it stood in its file; what is written out again.
    """

    prompt: Prompt
    split: str
    row: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.prompt.id


@dataclass(frozen=True)
class Items:
    """A data set.

    Args:
        unreadable: id → why no item could be made of the row.
        rows: of those, as they stood.
        reward, write_gold: of the task; `write_gold` makes a completion that is right.
    """

    name: str
    items: tuple[Item, ...]
    unreadable: Mapping[str, str]
    rows: Mapping[str, Any]
    task: PromptTask = field(repr=False)

    def reward(self, prompt: Prompt, text: str, finish: Finish = "stop") -> Score:
        """The verdict; a grader that raises leaves the answer unscorable."""
        try:
            return self.task.reward(prompt, text, finish)
        except Exception as error:  # any grader's: here it is data that is looked at
            return Score(None, reason=f"the grader raised {type(error).__name__}: {error}")

    @property
    def reader(self) -> Read:
        """What finds a completion's answer, by trying on gold: the first way that reads nearly all gold answers back."""
        prompts = [item.prompt for item in self.items[:: max(1, len(self.items) // 64)]]
        for read in READERS:
            found = [read(self.task.gold(prompt), prompt.answer) == prompt.answer for prompt in prompts]
            if sum(found) >= MOST * len(found):
                return read
        return answer_in


def _plain(text: str, gold: str) -> str | None:
    return text.strip()


def _by(extract: Callable[[str], str | None]) -> Read:
    return lambda text, gold: extract(text)


READERS: tuple[Read, ...] = (_by(in_tag), _by(after_marker()), answer_in, _plain)
NOT_GRADING = ("test", "split", "test_split", "config", "suffix", "answer_after")  # options of a table that say where rows are
TRIED = 64  # rows with which it is tried to make a task
MOST = 0.9  # share of gold answers that a way of reading must find


def open_items(spec: str, grader: str = "") -> Items:
    """A data set by its spec, or by the path of a JSONL or Parquet file.

    Args:
        spec: as `tasks.get_task` takes it. Of a table every row becomes an item, and the two columns are found by their usual
            names where the spec does not say.
        grader: by name, in place of the task's own (`rewards.graders.get_grader`).

    Raises:
        KeelError: no such task, file, column or grader.
    """
    spec = (
        f"{Path(spec).suffix[1:]}:{spec}" if Path(spec.partition("?")[0]).suffix in (".jsonl", ".parquet") and _bare(spec) else spec
    )
    kind = spec.partition(":")[0]
    items = _from_table(spec, kind) if kind in TABLES else _from_task(spec)
    if not grader:
        return items
    return replace(items, task=replace(items.task, grade=get_grader(grader)))


def _bare(spec: str) -> bool:
    return spec.partition("?")[0].partition(":")[0] not in TABLES


def _from_task(spec: str) -> Items:
    task = unchecked_task(spec)
    rows = [(split, prompt) for split in ("train", "test") for prompt in getattr(task, split)]
    items = tuple(Item(p, split, {"id": p.id, "prompt": p.text, "answer": p.answer}) for split, p in rows)
    whole = PromptTask(task.name, task.train, task.test, lambda prompt, text: task.reward(prompt, text, "stop"), task.gold)
    return Items(task.name, items, {}, {}, whole)


def _from_table(spec: str, kind: str) -> Items:
    head, _, query = spec.partition("?")
    variant, options = head.partition(":")[2], dict(parse_qsl(query, keep_blank_values=True))
    sources = [("row", variant), *([("test", options["test"])] if options.get("test") else [])]
    items: list[Item] = []
    unreadable, bad = {}, {}
    for prefix, source in sources:
        rows = list(_read(kind, source, options))
        columns = _columns(rows, options)
        for number, row in enumerate(rows):
            id = f"{prefix}/{number}"
            try:
                prompt = _prompt(id, row, columns, options)
            except ValueError as why:
                unreadable[id], bad[id] = str(why), row
                continue
            test = prefix == "test" or (len(sources) == 1 and held_out(prompt.text))
            items.append(Item(prompt, "test" if test else "train", row))
    splits = {split: [item.prompt for item in items if item.split == split] for split in ("train", "test")}
    task = replace(_graded(head, items, columns, options, unreadable), train=splits["train"], test=splits["test"])
    return Items(head, tuple(items), unreadable, bad, task)


def _graded(
    name: str, items: list[Item], columns: Mapping[str, str], options: Mapping[str, str], unreadable: Mapping[str, str]
) -> PromptTask:
    """A task that grades as the spec says, made of the first row that its grader accepts."""
    chosen = {key: value for key, value in options.items() if key not in NOT_GRADING} | columns
    tried: KeelError | None = None
    for item in items[:TRIED]:
        try:
            return table(name, lambda source, row=item.row: [row], name, **{**chosen, "test": name})
        except KeelError as fault:
            tried = tried or fault
    id, why = next(iter(unreadable.items()), ("", "there are none"))
    raise tried or KeelError(f"Not one row of {name!r} can be read; {id}: {why}. Expected a question and an answer in each.")


def _read(kind: str, source: str, options: Mapping[str, str]) -> Iterable[Mapping[str, Any]]:
    if kind == "datasets":
        return read_datasets(source, options.get("split", "train"), options.get("config", ""))
    file = Path(source).expanduser()
    if not file.is_file():
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise KeelError(f"There is no file {source!r}. {nearest(file.name, near).capitalize()}Expected a {kind} file.")
    return read_jsonl(file) if kind == "jsonl" else read_parquet(file)


def _columns(rows: list[Mapping[str, Any]], options: Mapping[str, str]) -> dict[str, str]:
    present = list(dict.fromkeys(str(key) for row in rows for key in row))
    chosen = {}
    for role, usual in (("prompt", PROMPTS), ("answer", ANSWERS)):
        given = options.get(role)
        found = given if given in present else next((name for name in usual if name in present), None) if not given else None
        if found is None:
            raise KeelError(
                f"No row has {f'the column {given!r}' if given else f'a column that looks like the {role}'}: "
                f"{nearest(given or role, present)}There are {', '.join(present)}. Name it in the spec: ?{role}=COLUMN."
            )
        chosen[role] = found
    return chosen


def _prompt(id: str, row: Mapping[str, Any], columns: Mapping[str, str], options: Mapping[str, str]) -> Prompt:
    text, gold = _text(row, columns["prompt"]), _text(row, columns["answer"])
    after = options.get("answer_after", "")
    if after and after not in gold:
        raise ValueError(f"its answer has no {after!r}")
    gold = gold.rsplit(after, 1)[1] if after else gold
    if not gold.strip():
        raise ValueError(f"its {columns['answer']!r} is empty")
    return Prompt(id=id, text=text + options.get("suffix", ""), answer=gold.strip(), data={"row": id})


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or not str(value).strip():
        raise ValueError(f"its {column!r} is {value!r}; expected a text or a number")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
