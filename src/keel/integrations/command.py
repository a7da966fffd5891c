"""`keel export`: a run as a folder that any engine loads, or a recipe as an engine's configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.errors import KeelError


def run(options: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    """Write what is asked for, and print where it is; without a place for it a configuration is printed itself.

    Raises:
        KeelError: no such run, recipe or engine, or the place exists or cannot be written.
    """
    return _configuration(options, overrides) if options.to else _policy(options, overrides)


def _policy(options: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    if overrides or options.adapter:
        given = ", ".join([*overrides, *(["--adapter"] if options.adapter else [])])
        raise KeelError(f"keel export came with {given}. Expected settings only with --to ENGINE: a run keeps its own.")
    from keel.run_folder import RunFolder

    folder = RunFolder.open(options.source)
    from keel.models.export import export
    from keel.parts import trained_policy

    print(export(trained_policy(folder, options.step), options.out or folder.path / "export"))
    return 0


def _configuration(options: argparse.Namespace, overrides: Mapping[str, Any]) -> int:
    from keel.config import load_config
    from keel.integrations.export import write

    written = write(options.to, load_config(options.source, dict(overrides)), options.adapter)
    if options.out is None:
        print(written.text, end="")
    else:
        _save(written.text, Path(options.out).expanduser())
        print(options.out)
    if written.missing:
        told = [f"{options.to} does not express all of {options.source}:", *(f"  {phrase}" for phrase in written.missing)]
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
