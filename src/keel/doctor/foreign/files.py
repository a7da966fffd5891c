"""Metric logs as other tools write them, read as rows of step → numbers under the names that stand there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from keel.errors import KeelError

Rows = dict[int, dict[str, float]]
PLACES = ("trainer_state.json", "*.jsonl", "*tfevents*", "*.wandb", "*.log", "*.txt")  # in a folder, the first that has any
_CONSOLE = re.compile(r"step:(\d+) - (\S+:\S+.*)")
_PAIR = re.compile(r"(\S+?):([-+]?(?:\d[\d_.]*(?:[eE][-+]?\d+)?|nan|inf))(?: - |$)")
_BLOCK, _FRAME = 32768, 7  # bytes of a block of a .wandb file, and of the head of each piece in it


def read_rows(path: Path) -> Rows:
    """Numbers by step, of a file or of the first kind of log that a folder holds.

    Raises:
        KeelError: no such file, no log in the folder, nothing in it that is a metric, or a package that is missing.
    """
    if not path.exists():
        raise KeelError(f"There is no file or folder {str(path)!r}. Expected a metric log, or a folder with one in it.")
    found: Rows = {}
    for file in _files(path):
        for step, numbers in _reader(file)(file):
            found.setdefault(step, {}).update(numbers)
    if not found:
        raise KeelError(
            f"No metrics were found in {str(path)!r}. Expected TRL's trainer_state.json, JSON lines with a step, lines of "
            "verl's console (step:1 - actor/pg_loss:0.1 - …), TensorBoard's event files, or an offline .wandb file."
        )
    return dict(sorted(found.items()))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for place in PLACES:
        files = [file for file in sorted(path.rglob(place)) if file.is_file()]
        if files and place == "trainer_state.json":  # each checkpoint's holds all that came before it
            return [max(files, key=lambda file: file.stat().st_mtime_ns)]
        if files:
            return files
    return []


def _reader(file: Path) -> Any:
    if "tfevents" in file.name:
        return _tensorboard
    return {".wandb": _wandb, ".json": _trainer_state, ".jsonl": _json_lines}.get(file.suffix, _console)


def _trainer_state(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError):
        raise KeelError(f"{str(file)!r} has no log_history. Expected the trainer_state.json of a trainer.") from None
    yield from (_told(row) for row in history if isinstance(row, dict) and "step" in row)


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a torn line
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield _told(row["data"] | {"step": row["step"]} if isinstance(row.get("data"), dict) else row)


def _console(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _CONSOLE.search(line)
        if found:
            numbers = {name: float(value.replace("_", "")) for name, value in _PAIR.findall(found[2])}
            yield int(found[1]), numbers


def _tensorboard(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    module = _imported("tensorboard.backend.event_processing.event_accumulator", "tensorboard")
    events = module.EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            yield event.step, {_plain(tag): event.value}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            if len(event.tensor_proto.float_val) == 1:
                yield event.step, {_plain(tag): event.tensor_proto.float_val[0]}


def _wandb(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    module = _imported("wandb.proto.wandb_internal_pb2", "wandb")
    for record in _pieces(file.read_bytes()):
        told = module.Record.FromString(record)
        if told.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in told.history.item}
            row = {_plain(name): json.loads(value) for name, value in items.items()}
            step = row.get("global_step", row.get("_step", told.history.step.num))
            yield _told({name: value for name, value in row.items() if not name.startswith("_")} | {"step": int(step)})


def _pieces(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of pieces (checksum 4, length 2, kind 1); kinds 2, 3, 4 begin, go on and end a record."""
    place, whole = _FRAME, b""  # the file's own head is as long as a piece's
    while place + _FRAME <= len(data):
        if _BLOCK - place % _BLOCK < _FRAME:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        end = place + _FRAME + length
        if kind == 0 or end > len(data):  # padding, or a record that was not written to its end
            return
        whole += data[place + _FRAME : end]
        place = end
        if kind in (1, 4):
            yield whole
            whole = b""


def _plain(tag: str) -> str:
    """Without the "train/" that the transformers trainer puts before every name."""
    return tag.removeprefix("train/")


def _told(row: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Numbers of a row; null is a mean of nothing, and absent."""
    numbers = {_plain(n): float(v) for n, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    step = numbers.pop("step")
    if not math.isfinite(step):
        raise KeelError(f"A row's step is {step}. Expected a whole number.")
    return int(step), numbers


def _imported(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as missing:
        raise KeelError(
            f"Reading this log needs the package {extra}, which cannot be imported ({missing}). Install it with "
            f"`pip install 'keel-rl[{extra}]'`, or hand in a JSON-lines or console log."
        ) from None


def names_in(rows: Iterable[Mapping[str, float]]) -> set[str]:
    """Every name that stands in any row."""
    return {name for row in rows for name in row}
