"""Two estimators in the same worlds: direction, size and noise of one against the other, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.audit.certificate import known_world
from keel.exact.expectation import Loss, expect
from keel.exact.world import Setting

PLACES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("on-policy", {}),
    ("on-policy, one token", {"max_tokens": 1}),
    ("on-policy, three tokens", {"max_tokens": 3, "prompts": 1, "group_size": 3}),
    ("near the reference", {"ref": 0.1}),
    ("stale by .3 a logit", {"drift": 0.3}),
    ("engine gap .3 a logit", {"gap": 0.3}),
)


@dataclass(frozen=True)
class Comparison:
    """Estimator a against estimator b, in one world.

    Args:
        cosine: between their expected updates; NaN where one expects none.
        scale: best multiple of b's for a's.
        relative: ‖E[a] − E[b]‖ relative to ‖E[b]‖.
        variance_ratio: of the traces of their covariances, a over b.
        signal_a, signal_b: ‖E[g]‖ over the root of the trace, of one batch.
    """

    cosine: float
    scale: float
    relative: float
    variance_ratio: float
    signal_a: float
    signal_b: float


def compare(a: Loss, b: Loss, knobs: Mapping[str, Any] | None = None, seed: int = 0) -> list[tuple[str, Comparison]]:
    """Both in every place of `PLACES`; knobs hold in all of them."""
    return [(place, _compare(a, b, Setting.of({**conditions, **(knobs or {})}), seed)) for place, conditions in PLACES]


def _compare(a: Loss, b: Loss, setting: Setting, seed: int) -> Comparison:
    world = known_world(setting, seed)
    of_a, of_b = expect(world, a), expect(world, b)
    x, y = of_a.direction, of_b.direction
    size = float(y.norm())
    silent = size <= 1e-12 * math.sqrt(of_b.second_moment) or float(x.norm()) <= 1e-12 * math.sqrt(of_a.second_moment)
    return Comparison(
        cosine=math.nan if silent else float(x @ y / (x.norm() * y.norm())),
        scale=math.nan if silent else float(x @ y / (y @ y)),
        relative=float((x - y).norm()) / size if size else math.nan,
        variance_ratio=of_a.variance / of_b.variance if of_b.variance else math.nan,
        signal_a=of_a.signal_to_noise,
        signal_b=of_b.signal_to_noise,
    )
