"""`keel data check` and `keel data build`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keel.data.check import Findings, check
from keel.data.items import open_items
from keel.data.samples import read_samples
from keel.errors import KeelError
from keel.files import append_jsonl, json_of


def find(
    spec: str,
    *,
    against: Sequence[str] = (),
    samples: str = "",
    grader: str = "",
    also: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Findings:
    """Check a data set. Arguments as of `run_check`."""
    items = open_items(spec, grader)
    if not items.items:
        id, why = next(iter(items.unreadable.items()), ("", "there are none"))
        raise KeelError(f"Not one row of {spec!r} can be read; the first, {id}: {why}. Expected a question and an answer in each.")
    sampled = read_samples(samples, items.items) if samples else None
    return check(items, [open_items(other) for other in against], sampled, also=also, keep=keep)


def run_check(
    spec: str,
    *,
    against: Sequence[str] = (),
    samples: str = "",
    grader: str = "",
    also: Sequence[str] = (),
    keep: Sequence[str] = (),
    out: str = "",
    as_json: bool = False,
) -> int:
    """`keel data check`.

    Args:
        spec: a task, or a JSONL or Parquet file.
        against: specs or files that are evaluated on: no row may stand in them.
        samples: a run folder or a JSONL of completions, which tell how hard the items are and which gold answers are suspect.
        grader: by name, in place of the task's.
        also, keep: kinds of faults to drop rows for, and not to.
        out: the cleaned set; what was dropped, and why, goes next to it (`.dropped.jsonl`). "" writes nothing.

    Returns:
        0: a fault is a finding and not a failure.
    """
    from keel.data.words import told

    places = written_to(out) if out else []
    found = find(spec, against=against, samples=samples, grader=grader, also=also, keep=keep)
    if places:
        write_clean(found, *places)
    print(json_of(found.as_json()) if as_json else told(found, " and ".join(map(str, places))))
    return 0


def written_to(out: str) -> list[Path]:
    """Files of a cleaned set.

    Raises:
        KeelError: one exists already, or its folder does not.
    """
    clean = Path(out).expanduser()
    return new_files(clean, clean.with_name(f"{clean.stem}.dropped.jsonl"))


def new_files(*files: Path) -> list[Path]:
    """The same files, if they can be made.

    Raises:
        KeelError: one exists already, or its folder does not.
    """
    for file in files:
        if file.exists() or not file.parent.is_dir():
            found = "exists already" if file.exists() else f"has no folder {str(file.parent)!r}"
            raise KeelError(f"{str(file)!r} {found}. Expected a new file in a folder that exists: nothing is overwritten.")
    return list(files)


def write_clean(found: Findings, clean: Path, dropped: Path) -> None:
    """The rows that are left, as they stood in their file; and those that are not, each with the reason."""
    append_jsonl(clean, (item.row for item in found.kept))
    rows = {item.id: item.row for item in found.items.items} | dict(found.items.rows)
    gone = found.dropped.values()
    append_jsonl(dropped, ({"dropped": f.kind, "why": f.why, "id": f.id, "like": f.other, "row": rows.get(f.id)} for f in gone))
