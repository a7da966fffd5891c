"""What the page shows of one run folder: its settings, its steps, and as many of its completions as a page holds."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.errors import KeelError
from keel.run_folder import LONGEST_SAID
from keel.settings import dotted, read_toml

LONGEST = 100_000  # characters of a text that a page keeps
TRACED = ("logp", "logp_rollout", "entropy", "ratio", "advantage", "gap")
_STEP = re.compile(rb'\{"step": (\d+),')
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run as it is on disk now, finished or not.

    Args:
        name: as the page calls it.
        arm, seed: of the study that it belongs to; "" and its own seed otherwise.
        config: dotted settings.
        rows: of metrics.jsonl.
        summary: of summary.json; empty while it trains.
    """

    name: str
    path: Path
    arm: str = ""
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    rows: tuple[Row, ...] = field(default=(), repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int:
        return int(self.config.get("steps", self.step))

    @property
    def ended(self) -> bool:
        return bool(self.summary)


def read_run(path: Path, name: str = "", arm: str = "") -> RunData:
    """A run folder, of this version or another: what cannot be read as settings of today is still shown.

    Raises:
        KeelError: it is no run folder.
    """
    if not (path / "config.toml").is_file():
        found = "has no config.toml" if path.is_dir() else "does not exist"
        raise KeelError(f"{str(path)!r} is not a run folder: it {found}. Expected a folder that `keel train` or `keel study` made.")
    config = dotted(read_toml(path / "config.toml"))
    return RunData(
        name=name or path.name,
        path=path,
        arm=arm,
        seed=int(config.get("seed", 0)),
        config=config,
        manifest=read_json(path / "manifest.json"),
        rows=tuple(_read(path / "metrics.jsonl", line) for _, line in _lines(path / "metrics.jsonl")),
        summary=read_json(path / "summary.json"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object; empty if there is none, or it is not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


# ── completions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def rollouts(runs: Sequence[RunData], most: int) -> dict[str, Any]:
    """Completions of all runs as columns, with their prompts and their single tokens apart.

    Of each run at most its share of `most`: whole batches, those with recorded tokens first, spread evenly over the steps.
    """
    table = _Table()
    kept = total = 0
    for index, run in enumerate(runs):
        sizes = _sizes(run.path / "rollouts.jsonl")
        traces = _traces(run.path / "tokens.jsonl")
        steps = chosen_steps(sizes, _trained_in(sizes, traces), most // len(runs))
        rows = list(_of_steps(run.path / "rollouts.jsonl", steps, most // len(runs)))
        table.add(index, rows, traces, str(run.config.get("task", "")))
        total += sum(sizes.values())
        kept += len(rows)
    return {"kept": kept, "total": total, "prompts": table.prompts, "traces": table.traces, **table.columns}


def chosen_steps(sizes: Mapping[int, int], traced: Iterable[int], most: int) -> set[int]:
    """Steps whose completions together are at most `most`: the first and the last, those with tokens, then others."""
    steps = sorted(sizes)
    preferred = dict.fromkeys([*steps[:1], *steps[-1:], *spread(sorted(traced)), *spread(steps)])
    chosen, room = set(), most
    for step in preferred:
        if sizes[step] <= room or not chosen:
            chosen.add(step)
            room -= sizes[step]
    return chosen


def spread(items: Sequence[int]) -> Iterator[int]:
    """The same items in an order of which every beginning is spread over the whole."""
    queue = [(0, len(items))]
    while queue:
        begin, end = queue.pop(0)
        if begin < end:
            middle = (begin + end) // 2
            yield items[middle]
            queue += [(begin, middle), (middle + 1, end)]


def _sizes(path: Path) -> dict[int, int]:
    """Completions of each step, without reading what they say."""
    sizes: dict[int, int] = defaultdict(int)
    for step, _ in _lines(path):
        sizes[step] += 1
    return dict(sizes)


def _of_steps(path: Path, steps: set[int], most: int) -> Iterator[Row]:
    left = most
    for step, line in _lines(path):
        if step in steps and left > 0:
            left -= 1
            yield _read(path, line)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                found = _STEP.match(line)
                yield int(found[1]) if found else int(_read(path, line).get("step", 0)), line


def _read(path: Path, line: bytes) -> dict[str, Any]:
    """One line of a run's file.

    Raises:
        KeelError: it is no JSON object.
    """
    try:
        found = json.loads(line)
    except ValueError as fault:
        found = fault
    if not isinstance(found, dict):
        raise KeelError(
            f"{path} has a line that is no JSON object ({found if isinstance(found, ValueError) else type(found).__name__}): "
            f"{line[:80]!r} … Expected one object a line, as keel writes them. Mend that line, or take it out."
        )
    return found


def _traces(path: Path) -> dict[tuple[str, int], list[Row]]:
    told = defaultdict(list)
    for _, line in _lines(path):
        row = _read(path, line)
        told[str(row.get("prompt_id")), int(row.get("sample", 0))].append(row)
    return dict(told)


def _trained_in(sizes: Mapping[int, int], traces: Mapping[Any, Sequence[Row]]) -> set[int]:
    """The batches, by the step of their first update, that the traced updates belong to."""
    updates = {int(row["step"]) for rows in traces.values() for row in rows}
    return {max(before) for update in updates if (before := [step for step in sizes if step <= update])}


class _Table:
    """Completions as columns; what many share is said once."""

    def __init__(self) -> None:
        names = ("run", "step", "prompt", "sample", "text", "more", "reward", "state", "cut", "tokens", "trace")
        self.columns: dict[str, list[Any]] = {name: [] for name in (*names, "said", "reason", "parts")}
        self.prompts: list[dict[str, str]] = []
        self.traces: list[dict[str, Any]] = []
        self._known: dict[tuple[str, str], int] = {}

    def add(self, run: int, rows: Iterable[Row], traces: Mapping[tuple[str, int], Sequence[Row]], task: str) -> None:
        for row in rows:
            text = str(row.get("completion", ""))
            self._row(
                run=run,
                step=int(row.get("step", 0)),
                prompt=self._prompt(row),
                sample=int(row.get("sample", 0)),
                text=text[:LONGEST],
                more=max(0, len(text) - LONGEST),
                reward=row.get("reward"),
                state=_state(row),
                cut=int(row.get("finish") == "length"),
                tokens=int(row.get("tokens", 0)),
                said=_said(row, text, task),
                reason=_why(row),
                parts=_parts(row),
                trace=self._trace(row, traces),
            )

    def _row(self, **values: Any) -> None:
        for name, column in self.columns.items():
            column.append(values[name])

    def _prompt(self, row: Row) -> int:
        key = str(row.get("prompt_id", "")), str(row.get("prompt", ""))
        if key not in self._known:
            self._known[key] = len(self.prompts)
            self.prompts.append({"id": key[0], "text": key[1][:LONGEST], "answer": str(row.get("answer", ""))[:LONGEST]})
        return self._known[key]

    def _trace(self, row: Row, traces: Mapping[tuple[str, int], Sequence[Row]]) -> int:
        """Where this completion's tokens are: in the first update that saw it."""
        known = traces.get((str(row.get("prompt_id")), int(row.get("sample", 0))), ())
        later = [trace for trace in known if trace["step"] >= row.get("step", 0)]
        if not later or not _same(later[0], row):
            return -1
        self.traces.append({"step": later[0]["step"], "tokens": later[0]["tokens"]} | {name: later[0].get(name) for name in TRACED})
        return len(self.traces) - 1


def _same(trace: Row, row: Row) -> bool:
    """Whether tokens are those of this completion, and not of a later one of the same prompt."""
    return len(trace["tokens"]) == row.get("tokens") and "".join(trace["tokens"]).startswith(str(row.get("completion", ""))[:200])


def _state(row: Row) -> int:
    """0 right, 1 wrong, 2 without a verdict."""
    return 2 if row.get("reward") is None else int(not row.get("correct"))


def _parts(row: Row) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (row.get("parts") or {}).items())


def _why(row: Row) -> str:
    """Why a verdict is what it is, as far as the grader said so, or the answers that it compared show it."""
    told = row.get("unscorable") or row.get("reason")
    if told or row.get("reward") is None:
        return str(told or "not scored")
    if not row.get("said"):
        return ""
    if not row.get("correct"):
        return "not the gold answer"
    return "the gold answer" if str(row["said"]).strip() == str(row.get("answer", "")).strip() else "equals the gold answer"


def _said(row: Row, text: str, task: str) -> str:
    """What the grader took for the answer; where an older run did not keep it, what this page would take."""
    if row.get("said") or row.get("unscorable") or row.get("reason") or row.get("finish") != "stop":
        return str(row.get("said") or "")[:LONGEST_SAID]
    return read_as(text, str(row.get("answer", "")), task)[:LONGEST_SAID]


def read_as(text: str, gold: str, task: str) -> str:
    """The answer that a task's usual grader takes from a completion; "" where none is known."""
    from keel.rewards.answer.extract import extract
    from keel.rewards.exact import after_marker, answer_in

    if "grader=code" in task or "grader=judge" in task:
        return ""
    if "arithmetic:" in task or "skills:" in task:
        return after_marker()(text) or ""
    tail = text[-4000:]
    return (extract(tail) if "grader=answer" in task else answer_in(tail, gold)) or ""
