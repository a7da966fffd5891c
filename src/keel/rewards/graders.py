"""Graders by name: functions (Prompt, completion text) → Score that compare a text with the prompt's gold answer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qsl

from keel.errors import KeelError, nearest
from keel.rewards.exact import after_marker, exact, exact_anywhere, in_tag, last_line, last_number
from keel.types import Prompt, Score

Grader = Callable[[Prompt, str], Score]
EXACT: dict[str, Grader] = {
    "exact": exact_anywhere,
    "number": exact(last_number),
    "line": exact(last_line),
    "tag": exact(in_tag),
    "marker": exact(after_marker()),
    "text": exact(str.strip),
}
_HOMES = {"answer": "keel.rewards.answer:AnswerGrader"}  # name → module:function, imported when it is asked for
_REGISTERED: dict[str, Grader] = {}


def register(name: str, grader: Grader) -> Grader:
    """Make `get_grader(name)` find a grader of your own.

    Raises:
        KeelError: the name is taken by another one.
    """
    if name in EXACT or name in _HOMES or _REGISTERED.get(name, grader) is not grader:
        raise KeelError(f"Grader {name!r} cannot be registered: the name is taken. Choose another one.")
    _REGISTERED[name] = grader
    return grader


def known_graders() -> list[str]:
    """Names that `get_grader` knows, apart from functions of one's own."""
    return sorted({*EXACT, *_HOMES, *_REGISTERED})


def get_grader(name: str) -> Grader:
    """A grader by its name, or the function at "package.module:function" or "path/to/file.py:function".

    A class that is found there is made without arguments, and its instances are to be called. A judge is
    "judge:RUBRIC.toml?model=NAME&base_url=URL", with the settings of `rewards.judge_server.JudgeSettings`.

    Raises:
        KeelError: no such grader, module, file or function, or settings that a judge does not take.
    """
    if name.startswith("judge:"):
        return _judge(name.removeprefix("judge:"))
    if name in EXACT or name in _REGISTERED:
        return EXACT.get(name) or _REGISTERED[name]
    place = _HOMES.get(name, name)
    if ":" not in place:
        raise KeelError(
            f"There is no grader {name!r}: {nearest(name, known_graders())}Known are {', '.join(known_graders())} and "
            f"judge:RUBRIC.toml. One of your own: path/to/file.py:function or package.module:function, which takes (prompt, text) "
            f"and returns a keel Score."
        )
    module, _, function = place.rpartition(":")
    found = getattr(_module(module, name), function, None)
    if not callable(found):
        raise KeelError(f"Grader {name!r}: {module} has no function {function!r}. Expected one that takes (prompt, text).")
    return found() if isinstance(found, type) else found


def _judge(spec: str) -> Grader:
    from keel.rewards.judge import judge_of
    from keel.rewards.rubric import load_rubric

    file, _, query = spec.partition("?")
    settings = {key: None if value == "none" else value for key, value in parse_qsl(query, keep_blank_values=True)}
    return judge_of(load_rubric(file), **settings)


def _module(module: str, name: str) -> ModuleType:
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec is not None and spec.loader is not None
        held = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(held)
        return held
    except (ImportError, FileNotFoundError) as missing:
        raise KeelError(f"Grader {name!r}: {missing}. Expected package.module:function, or path/to/file.py:function.") from missing
