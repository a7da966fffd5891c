"""Whether verdicts can be trusted: recorded numbers of runs are drawn again and again, with an effect planted or with none.

The runs of one arm under different sampling seeds differ by luck alone. Two disjoint draws of them are a planted null; with
a number added to one side they are a planted effect. Verdicts must call the first an effect in 5 % of draws or fewer, and find
the second as often as its minimum detectable effect says.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from keel.errors import KeelError
from keel.files import read_jsonl
from keel.lab.measures import series, value_at
from keel.lab.places import folder_name
from keel.lab.predictions import VALIDATION, At
from keel.lab.statistics import POWER, minimum_detectable, minimum_margin
from keel.lab.verdicts import calls


@dataclass(frozen=True)
class Calibration:
    """How often the rule decided, as shares of `draws` experiments of `seeds` pairs each.

    Args:
        effect: what was planted, in the numbers' own unit: the minimum detectable effect, or as given.
        null_supported, null_refuted: an effect called where there is none.
        found: the planted effect called, in its direction; `stated`: the chance with which it should be.
        equal_found: equality called where nothing differs, at the margin that should be shown with a chance of `stated`.
        equal_wrong: equality called at a true difference of just that margin: 5 % is allowed.
        error: of a share of 5 %, three standard deviations of so many draws.
    """

    seeds: int
    draws: int
    effect: float
    null_supported: float
    null_refuted: float
    found: float
    stated: float
    equal_found: float
    equal_wrong: float
    error: float

    @property
    def null_called(self) -> float:
        return self.null_supported + self.null_refuted

    @property
    def keeps_its_word(self) -> bool:
        """Nulls called in 5 % at most, and effects found within 5 points of what is stated, each but for the luck of the draws."""
        nulls = max(self.null_called, self.equal_wrong) <= 0.05 + self.error
        return nulls and abs(self.found - self.stated) <= 0.05 + self.error


def calibrate(
    values: Float[np.ndarray, "arms S"], seeds: int, draws: int = 2000, seed: int = 0, effect: float | None = None
) -> Calibration:
    """Try the rule of verdicts on recorded numbers.

    Args:
        values: one row an arm, one number a run, for example held-out pass@1 at the end of runs under different sampling seeds.
            Each arm is drawn equally often, and each draw stays within one arm.
        seeds: pairs of an experiment. Where an arm has 2·seeds runs or more they are drawn without putting back.
        draws: experiments.
        effect: planted; None = what these seeds should find with a chance of 80 %.

    Raises:
        KeelError: an arm has fewer than two runs, or a number is not finite.
    """
    if values.ndim != 2 or values.shape[1] < 2 or not np.isfinite(values).all():
        state = "" if np.isfinite(values).all() else ", not all finite,"
        raise KeelError(
            f"Recorded values of shape {values.shape}{state} cannot be drawn from. "
            "Expected one row an arm with at least two finite numbers."
        )
    disjoint = values.shape[1] >= 2 * seeds
    sd = float(np.sqrt(2 * values.var(axis=1, ddof=int(disjoint)).mean()))  # of a difference of two draws
    planted = minimum_detectable(sd, seeds) if effect is None else effect
    margin = minimum_margin(sd, seeds)
    nothing = differences(values, seeds, draws, np.random.default_rng(seed))
    supported, refuted = calls(nothing, "higher", 0.0)
    return Calibration(
        seeds=seeds,
        draws=draws,
        effect=planted,
        null_supported=float(supported.mean()),
        null_refuted=float(refuted.mean()),
        found=float(calls(nothing + planted, "higher", 0.0)[0].mean()),
        stated=POWER if effect is None else float("nan"),
        equal_found=float(calls(nothing, "equal", margin)[0].mean()),
        equal_wrong=float(calls(nothing + margin, "equal", margin)[0].mean()),
        error=3 * float(np.sqrt(0.05 * 0.95 / draws)),
    )


def recorded(place: Path, metric: str = VALIDATION, at: At = "end") -> Float[np.ndarray, "arms S"]:
    """One number of every run of a study folder, for the seeds under which all arms that ended came to one.

    Args:
        metric, at: as in a prediction, but for places that need another arm or metric.

    Raises:
        KeelError: it is no study folder, or not two seeds are whole.
    """
    if not (place / "study.json").is_file():
        raise KeelError(f"{str(place)!r} is not a study folder: it has no study.json. Expected one that `keel study` made.")
    arms = json.loads((place / "study.json").read_text(encoding="utf-8"))["arms"]
    found = [{run.name: _number(run, metric, at) for run in sorted((place / folder_name(arm)).glob("[0-9]*"))} for arm in arms]
    seeds = [seed for seed in found[0] if all(math.isfinite(mine.get(seed, math.nan)) for mine in found)]
    if len(seeds) < 2:
        raise KeelError(
            f"{place} has {len(seeds)} seeds under which every arm logs {metric!r}. Expected two or more: run it further."
        )
    return np.array([[mine[seed] for seed in seeds] for mine in found])


def _number(run: Path, metric: str, at: At) -> float:
    if not (run / "summary.json").is_file():
        return math.nan
    return value_at(series(read_jsonl(run / "metrics.jsonl"), [metric])[metric], metric, at)


def differences(
    values: Float[np.ndarray, "arms S"], seeds: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws seeds"]:
    """Experiments in which nothing differs: each the difference of two draws of runs of one arm."""
    arms, runs = values.shape
    which = rng.integers(arms, size=draws)
    if runs >= 2 * seeds:
        picked = np.stack([rng.choice(runs, 2 * seeds, replace=False) for _ in range(draws)])
    else:
        picked = rng.integers(runs, size=(draws, 2 * seeds))
    drawn = values[which[:, None], picked]
    return drawn[:, :seeds] - drawn[:, seeds:]
