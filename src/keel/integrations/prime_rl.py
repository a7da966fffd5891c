"""keel's objectives as prime-rl's custom loss and custom advantage: plain functions, named by their import paths.

    [trainer.loss]
    type = "custom"
    import_path = "keel.integrations.prime_rl.loss"
    kwargs = { recipe = "dapo" }

prime-rl hands over one sequence at a time: the trainer's and the engine's log-probabilities, advantages and a mask. It adds the
losses up and divides them by the trained tokens of the step on all ranks, so that an objective's aggregate must be the token
mean. There is no third policy at the sampling weights. An objective that corrects the engine gap sees all of π/μ as that gap,
and a ratio of 1; one that does not sees all of it as its ratio.

Source of the interface: PrimeIntellect-ai/prime-rl, docs/bring-your-own-algorithms.md at 1d79cfc (losses and advantages) and
docs/algorithms.md at 004274e (the same loss; advantages there are an environment's). Written from these, not run inside prime-rl.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError
from keel.integrations.objectives import objective_of, reads_gap, refuse_beyond, rows_of
from keel.objectives.aggregate import token_mean
from keel.objectives.objective import Objective
from keel.objectives.shaping import OverlongFilter
from keel.objectives.signals import Prepared, Scored, keep


@dataclass(frozen=True)
class LossOutputs:
    """What prime-rl reads of a loss: a scalar, the sum over the sequence's tokens, and numbers to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class AdvantageOutputs:
    """What prime-rl reads of advantages: [P, G]."""

    advantages: Float[Tensor, "P G"]


def loss(inputs: Any, recipe: str = "solid") -> LossOutputs:
    """A recipe's loss of one sequence, summed over its tokens.

    Args:
        inputs: `trainer_logprobs`, `inference_logprobs`, `advantages` and `loss_mask`, each [T]; a reference's, where prime-rl has
            them, as `ref_logprobs` or `teacher_logprobs`.

    Raises:
        KeelError: the recipe has what prime-rl does not hand to a loss.
    """
    objective = objective_of(recipe)
    refuse_beyond("prime-rl", recipe, beyond(objective))
    mask, logp, sampled = inputs.loss_mask[None], inputs.trainer_logprobs[None], inputs.inference_logprobs.detach()[None]
    batch = replace(rows_of(mask, None if reads_gap(objective) else sampled, sampled), logp_ref=_reference(inputs, objective))
    prepared = Prepared(keep(inputs.advantages[None], mask), mask, batch.group)
    per_token = objective.per_token(logp, torch.zeros_like(logp), batch, prepared)
    clipped = objective.clipped(logp, batch, prepared).sum() / mask.sum().clamp(min=1)
    return LossOutputs(per_token.sum(), {"clip_frac": clipped})


def advantage(inputs: Any, recipe: str = "solid") -> AdvantageOutputs:
    """A recipe's advantages of whole groups; those that differ within a completion cannot be said to prime-rl.

    Args:
        inputs: `rewards` [P, G], a group in each row, and `completion_lengths` [P, G] tokens.
    """
    objective, rewards = objective_of(recipe), inputs.rewards
    refuse_beyond("prime-rl", recipe, beyond(objective))
    flat, length = rewards.flatten(), inputs.completion_lengths.flatten()
    mask = torch.arange(int(length.max())) < length[:, None]
    group = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    scored = Scored(flat, group, torch.ones_like(flat, dtype=torch.bool), mask)
    made = objective.advantage(flat[:, None].expand(mask.shape), scored)
    return AdvantageOutputs(made[:, 0].reshape(rewards.shape))


def beyond(objective: Objective) -> list[str]:
    """What prime-rl does not hand to a loss, each in a phrase."""
    found = {
        f"its aggregate is {objective.aggregate.__name__}, and prime-rl divides by tokens": objective.aggregate is not token_mean,
        "its KL is in the reward": objective.reward_kl is not None,
        "a correction takes tokens out of the denominators": any(c.leaves for c in objective.corrections),
        "prime-rl does not say which completions were cut off": any(isinstance(s, OverlongFilter) for s in objective.shaping),
        "prime-rl hands no length cap to its shaping": any(not isinstance(s, OverlongFilter) for s in objective.shaping),
        "prime-rl hands over no entropy": objective.entropy_coef != 0,
    }
    return [phrase for phrase, holds in found.items() if holds]


def _reference(inputs: Any, objective: Objective) -> Float[Tensor, "1 T"] | None:
    if objective.loss_kl is None:
        return None
    held = getattr(inputs, "ref_logprobs", None)
    held = getattr(inputs, "teacher_logprobs", None) if held is None else held
    if held is None:
        raise KeelError(
            "The objective has a KL in its loss, and prime-rl hands over no reference's log-probabilities. Expected "
            "`ref_logprobs` or `teacher_logprobs`: configure a reference model, or a recipe without KL."
        )
    return held[None]
