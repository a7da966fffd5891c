"""What every adapter needs: an objective by any of its names, and a batch of which only log-probabilities are known."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.objective import Objective
from keel.objectives.registry import Recipe
from keel.types import Batch


def objective_of(chosen: str | Recipe | Objective) -> Objective:
    """The objective of a recipe, of a recipe's name ("dapo", "my_module:mine"), or itself."""
    from keel.objectives.recipes import recipe

    if isinstance(chosen, str):
        chosen = recipe(chosen)
    return chosen.objective if isinstance(chosen, Recipe) else chosen


def rows_of(
    mask: Bool[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"] | None,
    logp_rollout: Float[Tensor, "B T"],
    reward: Float[Tensor, " B"] | None = None,
    group: Int[Tensor, " B"] | None = None,
    truncated: Bool[Tensor, " B"] | None = None,
) -> Batch:
    """Completions as an objective sees them, where a framework keeps the token ids to itself: those are zero.

    Args:
        mask: trained tokens; what is left out is as if every completion was right, whole, and alone in its group.
    """
    size, width = mask.shape
    reward = mask.new_ones(size, dtype=logp_rollout.dtype) if reward is None else reward
    length = torch.where(mask, torch.arange(1, width + 1, device=mask.device), 0).amax(1)
    return Batch(
        tokens=mask.new_zeros(size, width, dtype=torch.long),
        prompt_len=mask.new_zeros(size, dtype=torch.long),
        completion_len=length,
        mask=mask,
        logp_rollout=logp_rollout,
        group=torch.arange(size, device=mask.device) if group is None else group,
        reward=reward,
        scorable=~reward.isnan(),
        correct=reward > 0,
        truncated=mask.new_zeros(size) if truncated is None else truncated,
        versions=mask.new_zeros(size, width, dtype=torch.long),
        logp_old=logp_old,
    )


def reads_gap(objective: Objective) -> bool:
    """Whether the engine's log-probabilities enter the loss."""
    return bool(objective.corrections) or objective.surrogate.weighs_gap


def refuse_beyond(framework: str, name: str, missing: list[str]) -> None:
    """Raise what stands between a recipe and a framework's functions, where there is something."""
    if missing:
        raise KeelError(f"{framework} cannot hold {name}: {'; '.join(missing)}. Expected a recipe without that; change that part.")
