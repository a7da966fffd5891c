"""`keel export RECIPE --to ENGINE`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.config import load_config
from keel.errors import KeelError
from keel.integrations.export import write


def run(source: str, overrides: Mapping[str, Any], *, engine: str, out: str | None, adapter: bool) -> int:
    """Write or print the configuration; tell on stderr what it does not express.

    Raises:
        KeelError: no such recipe or engine, or the file exists or cannot be written.
    """
    written = write(engine, load_config(source, dict(overrides)), adapter)
    if out is None:
        print(written.text, end="")
    else:
        _save(written.text, Path(out).expanduser())
        print(out)
    if written.missing:
        told = [f"{engine} does not express all of {source}:", *(f"  {phrase}" for phrase in written.missing)]
        print(*told, sep="\n", file=sys.stderr)
    return 0


def _save(text: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as there:
        raise KeelError(f"Cannot export to {str(path)!r}: it exists, and nothing is overwritten. Name a new file.") from there
    except OSError as error:
        raise KeelError(f"Cannot export to {str(path)!r}: {error}. Choose another place.") from error
