"""`keel gap`: sample with the engine, measure against the trainer, and say in words what the figures mean."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from keel.config import load_config
from keel.errors import KeelError
from keel.files import json_of
from keel.gap.floor import Floor, noise_floor, sample
from keel.gap.measure import Gap, measure
from keel.gap.remedies import Remedy, remedies
from keel.gap.routing import Routed, routed
from keel.gap.temperature import Fit, fit_temperature
from keel.parts import Parts, assemble, trained_policy
from keel.run_folder import RunFolder
from keel.training.batch import micro_batches
from keel.training.step import look
from keel.types import Batch

FITTED = 128  # completions that the best-fit temperature is read off


@dataclass(frozen=True)
class Found:
    """One measurement of one engine against one trainer."""

    model: str
    task: str
    engine: dict[str, Any]
    seconds: float
    gap: Gap
    floor: Floor
    fit: Fit
    remedies: list[Remedy]
    routing: Routed | None = None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def find(
    source: str, overrides: dict[str, Any] | None = None, *, samples: int = 512, group_size: int = 8, step: int | None = None
) -> Found:
    """Measure the gap between a run's or a model's trainer and an engine on the same weights.

    Args:
        source: a run folder (its own settings hold) or a model.
        overrides: settings on top: {"engine.format": "bf16", "sampling.temperature": 0.8}.
        samples: completions, at least one group of them.
        step: of a run: the checkpoint of this step, not the newest.

    Raises:
        KeelError: the settings do not fit together, or the engine broke its contract.
    """
    begun = time.perf_counter()
    parts = _parts(source, overrides or {}, step)
    config, policy, sampling = parts.config, parts.policy, parts.config.sampling.distribution()
    batch = sample(parts.engine, policy, parts.task, sampling, completions=samples, group_size=group_size, seed=config.seed)
    cuts = micro_batches(batch, config.train.micro_batch_tokens)
    seen = look(policy, batch, cuts, sampling.temperature)
    few = batch.rows(torch.arange(min(len(batch), FITTED)))
    whole = [torch.arange(len(few))]
    fit = fit_temperature(lambda factor: look(policy, few, whole, sampling.temperature * factor).logp, few.logp_rollout, few.mask)
    return Found(
        model=source,
        task=config.task,
        engine=parts.engine.describe(),
        gap=measure(seen.logp, batch.logp_rollout, batch.mask, seen.entropy, batch.group),
        floor=noise_floor(policy, batch, seen.logp, sampling.temperature),
        fit=fit,
        routing=routed(policy, batch, seen, cuts, sampling.temperature),
        remedies=_remedies(seen.logp, batch),
        seconds=time.perf_counter() - begun,
    )


def run(source: str, overrides: dict[str, Any], *, samples: int, group_size: int, step: int | None, as_json: bool) -> int:
    """The command.

    Returns:
        0: a gap is a finding and not a failure.
    """
    from keel.gap.words import told

    if samples < 2 * group_size or group_size < 1:
        raise KeelError(
            f"keel gap was asked for {samples} completions in groups of {group_size}. Expected at least two groups of at least "
            "one: completions of one prompt alone say nothing of how certain a figure is. Raise --samples."
        )
    found = find(source, overrides, samples=samples, group_size=group_size, step=step)
    print(json_of(found.as_json()) if as_json else told(found))
    return 0


def _parts(source: str, overrides: dict[str, Any], step: int | None) -> Parts:
    if os.path.isfile(os.path.join(source, "config.toml")):
        folder = RunFolder.open(source)
        return assemble(folder.config.replaced(overrides), trained_policy(folder, step))
    return assemble(load_config("solid", {"model": source} | overrides))


def _remedies(logp: torch.Tensor, batch: Batch) -> list[Remedy]:
    return remedies(logp - batch.logp_rollout, batch.mask)
