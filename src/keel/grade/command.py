"""`keel grade`: read the answers, ask the graders, say how far to trust each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from keel.errors import KeelError, nearest
from keel.files import json_of, write_atomically, written
from keel.grade.pairs import Pairs, read_pairs
from keel.grade.report import Report, report
from keel.grade.verdicts import Grader
from keel.rewards.graders import get_grader, known_graders

USUAL = ("answer", "exact")  # what is asked when nobody is named: the best that is there, and the plainest


def find(
    source: str | Path | Pairs,
    graders: Sequence[str] | Mapping[str, Grader] = (),
    *,
    columns: Mapping[str, str] | None = None,
    callers: int = 0,
    twice: bool = False,
    features: Sequence[str] = (),
    group_size: int = 8,
    seed: int = 0,
) -> Report:
    """Grade the graders.

    Args:
        source: a JSONL of answers, or answers that were read.
        graders: names as `rewards.graders.get_grader` takes them, or functions by the name to show; none = the usual ones.
        columns: role → column, for roles that are not to be guessed.

    Raises:
        KeelError: the file, a column or a grader is not there, or a number makes no sense.
    """
    if callers < 0 or group_size < 2:
        raise KeelError(
            f"keel grade got {callers} callers and groups of {group_size}. Expected 0 or more, and groups of 2 or more."
        )
    asked = graders if isinstance(graders, Mapping) else {name: get_grader(name) for name in graders or usual()}
    pairs = source if isinstance(source, Pairs) else read_pairs(source, **(columns or {}))
    _check_columns(pairs, features)
    return report(pairs, asked, callers=callers, twice=twice, features=features, group_size=group_size, seed=seed)


def _check_columns(pairs: Pairs, features: Sequence[str]) -> None:
    present = list(dict.fromkeys(key for pair in pairs.rows for key in pair.prompt.data))
    for column in features:
        if column not in present:
            raise KeelError(
                f"No row has the column {column!r} (feature): {nearest(column, present)}There are {', '.join(present)}."
            )


def usual() -> list[str]:
    """The graders that are asked when none is named."""
    return [name for name in USUAL if name in known_graders()]


def run(
    source: str,
    graders: Sequence[str],
    columns: Mapping[str, str],
    *,
    callers: int = 0,
    twice: bool = False,
    features: Sequence[str] = (),
    group_size: int = 8,
    markdown: str = "",
    as_json: bool = False,
) -> int:
    """The command.

    Args:
        markdown: file of the page; the reliability plot is written next to it. "" writes none.

    Returns:
        0: that a grader is bad is a finding and not a failure.
    """
    from keel.grade.words import told

    if markdown:
        _check_folder(Path(markdown))
    found = find(source, graders, columns=columns, callers=callers, twice=twice, features=features, group_size=group_size)
    if markdown:
        write_page(found, Path(markdown))
    print(json_of(found.as_json()) if as_json else told(found))
    return 0


def write_page(found: Report, path: Path) -> None:
    """The page, and next to it its picture where anything is labelled."""
    from keel.grade.page import page

    picture = path.with_suffix(".png") if found.pairs.labelled else None
    if picture is not None:
        from keel.grade.plot import draw

        draw(found, picture)
    with written(path.name, path.parent):
        write_atomically(path, page(found, picture.name if picture else ""))


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise KeelError(f"The page {str(path)!r} cannot be written: expected a file name in a folder that exists.")
