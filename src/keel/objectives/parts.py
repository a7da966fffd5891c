"""Parts by name, so that a configuration file or a command line can vary a recipe: `vary(objective,
{"surrogate.clip_high": 0.28})`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from keel.errors import KeelError, nearest
from keel.objectives import advantages, aggregate, corrections, kl, log_ratios, shaping, surrogates
from keel.objectives.objective import Objective


def _named(*parts: Any) -> dict[str, Any]:
    return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part.__name__).lower(): part for part in parts}


_RATIOS = _named(log_ratios.token, log_ratios.sequence, log_ratios.geometric_mean, log_ratios.prefix)

PARTS: dict[str, dict[str, Any]] = {
    "advantage": {
        "centred": advantages.centred,
        "leave_one_out": advantages.leave_one_out,
        "group_normalised": advantages.group_normalised,
        "none": advantages.none,
    },
    "baseline": _named(advantages.group_mean, advantages.sibling_mean, advantages.batch_mean, advantages.zero),
    "scale": _named(
        advantages.unscaled,
        advantages.GroupStd,
        advantages.RawBatchStd,
        advantages.CentredBatchStd,
        advantages.TokenWhitening,
        advantages.TokenStd,
    ),
    "log_ratio": _RATIOS,
    "surrogate": _named(
        surrogates.Reinforce,
        surrogates.Unclipped,
        surrogates.Clip,
        surrogates.DualClip,
        surrogates.Cispo,
        surrogates.MiniRL,
        surrogates.Gmpo,
        surrogates.Sapo,
    ),
    "corrections": _named(
        corrections.TruncateToken,
        corrections.MaskToken,
        corrections.TruncateSequence,
        corrections.MaskSequence,
        corrections.RejectGeometric,
        corrections.Veto,
        corrections.OffPolicyMask,
    ),
    "reward_kl": {
        "none": None,
        "k1": kl.RewardKL(estimator=kl.k1),
        "k2": kl.RewardKL(estimator=kl.k2),
        "k3": kl.RewardKL(estimator=kl.k3),
    },
    "loss_kl": {
        "none": None,
        "k1": kl.LossKL(estimator=kl.k1),
        "k2": kl.LossKL(estimator=kl.k2),
        "k3": kl.LossKL(estimator=kl.k3),
    },
    "estimator": _named(kl.k1, kl.k2, kl.k3, kl.k3_clamped),
    "level": _named(kl.per_token, kl.per_prefix, kl.per_sequence),
    "ratio": {"none": None, **_RATIOS},
    "aggregate": _named(
        aggregate.token_mean,
        aggregate.group_token_mean,
        aggregate.sequence_mean,
        aggregate.prompt_mean,
        aggregate.constant_length_mean,
        aggregate.balanced_mean,
    ),
    "shaping": _named(shaping.OverlongFilter, shaping.SoftOverlong),
}


def register_part(field: str, name: str, part: Any) -> None:
    """Make a part of your own known to `vary`, for instance `register_part("surrogate", "mine", Mine)`.

    Args:
        field: a key of `PARTS`.
        name: as configuration files will write it.
        part: the function, the object, or a class that makes one without arguments.
    """
    known = _choices(field)
    if known.get(name, part) is not part:
        raise KeelError(f"{field} has a part named {name!r} already. Expected a new name; choose another one.")
    known[name] = part


def part(field: str, name: str) -> Any:
    """The part of that name, with its default settings."""
    known = _choices(field)
    if name not in known:
        raise KeelError(f"No {field} is named {name!r}; {nearest(name, known)}Expected one of: {', '.join(known)}.")
    found = known[name]
    return found() if isinstance(found, type) else found


def vary(objective: Objective, changes: Mapping[str, Any]) -> Objective:
    """The objective with some choices changed, by dotted path; whole parts first, then their settings.

    `{"surrogate": "clip", "surrogate.clip_high": 0.28, "corrections": ["veto", "truncate_token"],
    "corrections.truncate_token.cap": 3.0}`

    Raises:
        KeelError: an unknown path or name, with the nearest known one; or an impossible combination.
    """
    settings: dict[str, Any] = {item.name: getattr(objective, item.name) for item in fields(objective)}
    for path in sorted(changes, key=lambda path: path.count(".")):
        head, _, rest = path.partition(".")
        if head not in settings:
            raise KeelError(
                f"An objective has no choice {head!r}; {nearest(head, settings)}Expected one of: {', '.join(settings)}."
            )
        settings[head] = _changed(head, settings[head], rest, changes[path])
    return Objective(**settings)


def _changed(field: str, current: Any, path: str, value: Any) -> Any:
    """`current` with the value at `path` below it replaced; the empty path is `current` itself."""
    if not path:
        return _chosen(field, _several(value) if isinstance(current, tuple) else value)
    if isinstance(current, tuple):
        return _changed_member(field, current, path, value)
    name, _, rest = path.partition(".")
    settings = [item.name for item in fields(current)] if is_dataclass(current) else []
    if name not in settings:
        known = ", ".join(settings) or "none, for it has no settings"
        raise KeelError(
            f"{field} has no setting {name!r} as it is chosen now, {describe(current)}; {nearest(name, settings)}"
            f'Expected one of: {known}. Another part is chosen by its name: {field} = "…".'
        )
    return replace(current, **{name: _changed(name, getattr(current, name), rest, value)})


def _changed_member(field: str, members: tuple, path: str, value: Any) -> tuple:
    name, _, rest = path.partition(".")
    kind = type(part(field, name))
    if not any(type(member) is kind for member in members):
        raise KeelError(f"{field} has no {name!r} as it is chosen now ({describe(members)}). Add it first: {field} = [{name!r}].")
    return tuple(_changed(name, member, rest, value) if type(member) is kind else member for member in members)


def _several(value: Any) -> Any:
    """A field that holds several parts, from a list, from "a,b" or "a" as a command line has it, or from none."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    return [] if value is None else value


def _chosen(field: str, value: Any) -> Any:
    """A name or a list of names becomes the part; numbers, booleans and finished parts are taken as they are."""
    if isinstance(value, list | tuple):
        return tuple(_chosen(field, item) for item in value)
    if field in ("corrections", "shaping") and isinstance(value, str):
        return part(field, value)
    return part(field, value) if isinstance(value, str) else value


def _choices(field: str) -> dict[str, Any]:
    if field not in PARTS:
        raise KeelError(f"There is no kind of part {field!r}; {nearest(field, PARTS)}Expected one of: {', '.join(PARTS)}.")
    return PARTS[field]


def describe(value: Any) -> str:
    """A choice in one phrase: a function by its name, an object by its name and settings."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " + ".join(describe(item) for item in value)
    if is_dataclass(value):
        settings = ", ".join(f"{item.name}={describe(getattr(value, item.name))}" for item in fields(value))
        return f"{type(value).__name__}({settings})"
    return getattr(value, "__name__", None) or f"{value}"
