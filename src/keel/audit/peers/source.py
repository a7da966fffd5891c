"""A module of another framework, run from its source file without what its package imports.

verl and OpenRLHF cannot be imported beside a current transformers, without ray, DeepSpeed or a GPU. The functions that make
their losses need none of these: the file is executed as it is written, except that imports of missing packages, and of the
framework's own, become placeholders that say so when they are called.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.errors import KeelError

HOW_TO_INSTALL = {
    "trl": 'pip install "trl>=1.16"',
    "verl": "pip install --no-deps verl",
    "openrlhf": "pip install --no-deps openrlhf",
}


def installed(peer: str) -> bool:
    """Whether the framework can be found; nothing of it is imported."""
    return importlib.util.find_spec(peer) is not None


def version(peer: str) -> str:
    """Of the installed distribution. Raises KeelError where there is none."""
    folder(peer)
    return importlib.metadata.version(peer)


def folder(peer: str) -> Path:
    """Where the framework's source lies. Raises KeelError with the way to install it."""
    spec = importlib.util.find_spec(peer)
    if spec is None or not spec.submodule_search_locations:
        raise KeelError(
            f"{peer} is not installed here. Expected its source, of which the loss functions are run as they are: "
            f"{HOW_TO_INSTALL[peer]} (its dependencies are not needed)."
        )
    return Path(list(spec.submodule_search_locations)[0])


def run_source(peer: str, path: str, given: Mapping[str, Any] | None = None) -> ModuleType:
    """The module at `path` within a framework's folder, executed.

    Args:
        given: names that its imports bind, in place of what it would import.

    Raises:
        KeelError: the framework or the file is missing.
    """
    file = folder(peer) / path
    if not file.is_file():
        raise KeelError(
            f"{peer} {version(peer)} has no {path}. Expected the file that holds its loss; this adapter was written for "
            f"another version: see `keel.audit.peers`."
        )
    module = ModuleType(f"{peer}_{file.stem}")
    module.__file__ = str(file)
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    tree.body = [kept for statement in tree.body if (kept := _importable(statement, peer, module, given or {})) is not None]
    exec(compile(tree, str(file), "exec"), module.__dict__)
    return module


def _importable(statement: ast.stmt, peer: str, module: ModuleType, given: Mapping[str, Any]) -> ast.stmt | None:
    """The statement, or None for an import that cannot or need not run: its names are bound instead."""
    if not isinstance(statement, ast.Import | ast.ImportFrom):
        return statement
    names = [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    roots = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
    relative = isinstance(statement, ast.ImportFrom) and statement.level > 0
    if not relative and not any(name in given for name in names) and all(_found(root, peer) for root in roots):
        return statement
    for name in names:
        module.__dict__[name] = given.get(name) or _placeholder(name, peer)
    return None


def _found(name: str, peer: str) -> bool:
    root = name.split(".")[0]
    return root != peer and importlib.util.find_spec(root) is not None


def _placeholder(name: str, peer: str) -> type:
    """A class under the name of what was not imported; it may stand in annotations, and refuses to be called or read."""

    class Absent(type):
        def __call__(cls, *_, **__):
            raise KeelError(f"{peer} calls {name}, which is not installed here. Expected a loss that does without it.")

        def __getattr__(cls, attribute: str):
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return _placeholder(f"{name}.{attribute}", peer)

    return Absent(name.rpartition(".")[2], (), {})
