"""Files that are whole or not there, and what a full disk says."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel.errors import KeelError

LONGEST_ROW = 1 << 18  # bytes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file at once: readers see the old or the new, never a part."""
    draft = path.with_name(f".draft-{path.name}-{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def json_of(value: Mapping[str, Any]) -> str:
    """Indented JSON; a number that is not finite becomes null, which JSON can say."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line per row, all of them or none."""
    text = "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", buffering=0) as file:
            _write_all(file, text.encode())
    except OSError as fault:
        if path.exists():
            os.truncate(path, before)
        raise disk_error(fault, path.name, path.parent) from fault


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of JSON lines; none if it is missing. A last line without its end is not there yet."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole row of a file of JSON lines, however long the file; None if there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_ROW))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2]) if len(lines) > 1 else None


def cut_jsonl(path: Path, step: int) -> None:
    """Keep rows up to a step, and drop a last line that a killed process left unfinished."""
    if not path.is_file():
        return
    draft = path.with_name(f".draft-{path.name}-{os.getpid()}")
    with open(path, encoding="utf-8") as old, open(draft, "w", encoding="utf-8") as new:
        new.writelines(line for line in old if line.endswith("\n") and json.loads(line)["step"] <= step)
        new.flush()
        os.fsync(new.fileno())
    os.replace(draft, path)


@contextmanager
def written(what: str, folder: Path) -> Iterator[None]:
    """Turns a write that fails inside into a KeelError."""
    try:
        yield
    except OSError as fault:
        raise disk_error(fault, what, folder) from fault


def disk_error(fault: OSError, what: str, folder: Path) -> KeelError:
    """The paragraph for a write that failed."""
    if fault.errno in NO_ROOM:
        return KeelError(
            f"There was no room on the disk for the {what} in {folder} ({fault.strerror}). What had been saved before "
            "is untouched, and nothing half-written is left. Free some space, or lower checkpoint.keep, and go on "
            "from the last checkpoint with `keel train --resume RUN`."
        )
    return KeelError(
        f"The {what} could not be written to {folder}: {fault}. Expected a folder that this user may write to. What "
        "had been saved before is untouched."
    )


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the disk hold a folder's names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
