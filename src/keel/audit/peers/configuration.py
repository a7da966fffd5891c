"""Configuration files as frameworks read them: known knobs with their values, unknown keys with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.audit.peers.defaults import TRL, TRL_OTHERS, TRL_SCRIPT, VERL, VERL_BRANCHES, VERL_MOVED, VERL_OTHERS
from keel.errors import KeelError, nearest

# knobs that are real numbers although their default is none
REAL = ("delta", "epsilon_high", "off_policy_mask_threshold", "min_p", "vllm_importance_sampling_cap",
        "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min")  # fmt: skip

Read = tuple[dict[str, Any], tuple["Unknown", ...], tuple[str, ...]]


@dataclass(frozen=True)
class Unknown:
    """A key that the framework does not know.

    Args:
        key: as written.
        nearest: the nearest key that it knows, "" for none.
    """

    key: str
    nearest: str

    @classmethod
    def of(cls, key: str, known: Mapping[str, Any] | set[str]) -> Unknown:
        hint = nearest(key, known)
        return cls(key, hint.split("'")[1] if hint else "")

    def text(self) -> str:
        """In a phrase."""
        return f"{self.key}; did you mean {self.nearest}?" if self.nearest else self.key


def read_file(framework: str, path: Path) -> Read:
    """(knobs of the loss, unknown keys, remarks) of a YAML file. Raises KeelError for what is no such file."""
    return {"trl": _trl, "verl": _verl}[framework](_yaml(path))


def _yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise KeelError("Reading YAML needs PyYAML, which is not installed. Expected it: pip install pyyaml.") from error

    if not path.is_file():
        raise KeelError(f"There is no file {path}. Expected a configuration in YAML.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KeelError(f"{path} is no YAML: {' '.join(str(error).split())}. Expected keys and values.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise KeelError(f"{path} holds a {type(content).__name__}. Expected keys and values.")
    return {str(key): value for key, value in content.items()}


def _trl(content: Mapping[str, Any]) -> Read:
    known = {*TRL, *TRL_OTHERS, *TRL_SCRIPT}
    given = {name: _typed(name, value, TRL[name]) for name, value in content.items() if name in TRL}
    return given, tuple(Unknown.of(name, known) for name in content if name not in known), ()


def _verl(content: Mapping[str, Any]) -> Read:
    given: dict[str, Any] = {}
    unknown, remarks = [], []
    for name, value in _flat(content):
        moved = VERL_MOVED.get(name)
        if moved:
            name, remark = moved
            remarks += [remark] if remark else []
        if isinstance(value, str) and (value.startswith("${") or value == "???"):
            remark = f"{name} is {value}, which only verl resolves: its default, {VERL.get(name)}, is taken."
            remarks += [remark] if name in VERL else []
        elif name in VERL:
            given[name] = _typed(name, value, VERL[name])
        elif name.startswith(VERL_BRANCHES) and not _other(name):
            unknown.append(Unknown.of(name, {*VERL, *VERL_OTHERS}))
    return given, tuple(unknown), tuple(dict.fromkeys(remarks))


def _other(name: str) -> bool:
    """Whether the name is a known key that does not touch the loss, or lies below one."""
    return any(name == other or name.startswith(other + ".") for other in VERL_OTHERS)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, name + ".")
        elif not name.rpartition(".")[2] == "_target_":
            yield name, value


def _typed(name: str, value: Any, default: Any) -> Any:
    """YAML reads 1e-6 as a string, and frameworks read it as a number: so do we. Thresholds may be two numbers, "0.5_5.0"."""
    if ".rollout_correction." in name and name.endswith("_threshold"):
        return value
    numeric = (isinstance(default, int | float) and not isinstance(default, bool)) or default is None
    if isinstance(value, str) and numeric:
        try:
            number = float(value)
        except ValueError:
            if default is None:
                return value
            raise KeelError(f"{name} is {value!r}. Expected a number, such as its default {default}.") from None
        return int(number) if number.is_integer() and isinstance(default, int) else number
    if numeric and default is not None and not isinstance(value, int | float | None):
        raise KeelError(f"{name} is {value!r}. Expected a number, such as its default {default}.")
    if isinstance(value, int) and not isinstance(value, bool) and (isinstance(default, float) or name in REAL):
        return float(value)
    if isinstance(default, bool) and name != "scale_rewards" and not isinstance(value, bool):
        raise KeelError(f"{name} is {value!r}. Expected true or false.")
    return value
