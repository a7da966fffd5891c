"""Reading settings, laying overrides on top, and saying what is wrong with them. Knows the shape of a config, not its
meaning.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from keel.errors import KeelError, nearest

# what other programs call it → what it is called here
ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_generations": "train.group_size",
    "n": "train.group_size",
    "rollout_n": "train.group_size",
    "batch_size": "train.prompts_per_step",
    "num_iterations": "train.updates_per_batch",
    "max_new_tokens": "sampling.max_completion_tokens",
    "max_tokens": "sampling.max_completion_tokens",
    "max_completion_length": "sampling.max_completion_tokens",
    "max_steps": "steps",
    "output_dir": "out",
    "algorithm": "recipe",
    "dataset": "task",
    "beta": "objective.loss_kl.kl_coef",
    "epsilon": "objective.surrogate.clip_low",
}


def parse_value(text: str) -> Any:
    """The value of a command-line override: a TOML number, boolean, list or table; "none"; anything else is text."""
    if text.lower() in ("none", "null"):
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | list | dict | str) else text


def as_list(value: Any, annotation: Any) -> Any:
    """For a setting that holds several values: "a,b" → ["a", "b"], 4 → [4] and "a" → ["a"]; else the value as it is.

    A word alone stays one where the setting can be a word too.
    """
    alternatives = annotation, *typing.get_args(annotation)
    if tuple not in map(typing.get_origin, alternatives) or not isinstance(value, str | int | float):
        return value
    if isinstance(value, str) and "," in value:
        return [parse_value(part.strip()) for part in value.split(",")]
    return [value] if not isinstance(value, str) or typing.get_origin(annotation) is tuple else value


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested tables: {"train.lr": 1} → {"train": {"lr": 1}}. What stands below `objective` stays
    dotted.
    """
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".", 1 if key.startswith("objective.") else -1)):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings as one; where both have a leaf, the one above counts."""
    tree = dict(below)
    for key, value in above.items():
        old = tree.get(key)
        tree[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return tree


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"surrogate": {"clip_high": 1}} → {"surrogate.clip_high": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def shipped() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def read_source(source: str) -> dict[str, Any]:
    """The settings that a TOML file, a shipped configuration or a recipe's name stands for."""
    if source.endswith(".toml"):
        return read_toml(Path(source))
    if source in shipped():
        return read_toml(shipped()[source])
    if "/" in source or "\\" in source:
        raise KeelError(f"{source!r} is not a TOML file. Expected a path that ends in .toml, a shipped configuration or a recipe.")
    return {"recipe": source}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeelError(
            f"There is no file {str(path)!r}. Expected a TOML file with settings; the shipped ones go by name: "
            f"{', '.join(shipped())}."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise KeelError(f"{path} is not TOML: {fault}. Expected lines such as lr = 1e-4 below [train]. Mend that place.") from None


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every setting below a model as (dotted name, annotation, default, phrase)."""
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield from settings_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.annotation, field.default, field.description or ""


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Section` or `Section | None`, else None."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def explain(found: ValidationError, model: type[BaseModel], file: str = "") -> str:
    """One paragraph on the first thing that is wrong, and how many more there are.

    Args:
        file: what settings of this kind stand in, such as "the study's file"; "" = they are a run's, and flags too.
    """
    first, *others = found.errors(include_url=False)
    raised = first.get("ctx", {}).get("error")
    place = ".".join(str(part) for part in first["loc"])
    if isinstance(raised, KeelError):
        said = str(raised)
    elif first["type"] == "extra_forbidden":
        said = unknown_setting(place, model, file)
    else:
        name, expected = _expected(place, model)
        how = f"Set it in {file}." if file else f"Set it on the command line by --{name} VALUE, or in a TOML file."
        said = f"{name} is {first['input']!r}: {_lower(first['msg'])}. Expected {expected}. {how}"
    return said if not others else f"{said} ({len(others)} more to mend after this one.)"


def unknown_setting(place: str, model: type[BaseModel], file: str = "") -> str:
    """The paragraph for a key that does not exist, with the nearest that does."""
    known = [name for name, *_ in settings_of(model)]
    hint = _nearest_setting(place, known)
    section = place.rpartition(".")[0]
    near = [name for name in known if name.rpartition(".")[0] == section] or known
    near += [] if section else sorted({f"{name.split('.')[0]}.*" for name in known if "." in name})
    more = "" if file else " `keel train --help` lists every setting with its default."
    return f"There is no setting {place!r}{f' in {file}' if file else ''}. {hint}Expected one of: {', '.join(near)}.{more}"


def _nearest_setting(place: str, known: list[str]) -> str:
    leaf = place.rpartition(".")[2]
    same = ELSEWHERE.get(leaf) or next((name for name in known if name.rpartition(".")[2] == leaf), None)
    hint = f"did you mean {same!r}? " if same else nearest(place, known) or nearest(leaf, known)
    return hint[:1].upper() + hint[1:]


def _expected(place: str, model: type[BaseModel]) -> tuple[str, str]:
    """The setting that a place lies in, and what it takes."""
    for name, annotation, default, phrase in settings_of(model):
        if place == name or place.startswith(f"{name}."):
            given = "" if default is PydanticUndefined else f"; default {default!r}"
            return name, f"{kind(annotation)} ({phrase}{given})"
    return place, "a table of settings"


def kind(annotation: Any) -> str:
    """A type as a reader writes it: "number", "text or none", "list of text"."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        return f"list of {kind(inner[0])}" if Ellipsis in inner else f"list of {len(inner)}: {kind(inner[0])} each"
    if origin is dict:
        return "table"
    if inner:
        return " or ".join(kind(each) for each in inner)
    return {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "none"}.get(annotation, "any")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
