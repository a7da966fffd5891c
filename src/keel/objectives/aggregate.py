"""Per-token losses → this micro-batch's share of the step's loss. Every denominator speaks of the whole optimizer step.

The shares of all micro-batches and ranks *sum* to the step's loss, however it is cut. None of these divides by anything
that it counted itself, except the tokens of a single completion, which no cut can split.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from keel.objectives.signals import Prepared, keep
from keel.types import StepCounts

Aggregate = Callable[[Float[Tensor, "B T"], Prepared, StepCounts], Float[Tensor, ""]]


def token_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Mean over all trained tokens of the step.

    L = Σᵢ Σₜ lossᵢₜ / tokens. Long completions weigh more; the mean is random, which leaks a little of the length into
    the gradient.

    Args:
        loss: per token; anything where masked.
        prepared: its mask says which tokens are trained.
        counts: of the whole optimizer step, not of this micro-batch.

    Source: DAPO, arXiv 2503.14476, its code (its formula is `group_token_mean`). Differs from it: the step, not the
    micro-batch.
    """
    return keep(loss, prepared.mask).sum() / counts.tokens.clamp(min=1)


def group_token_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Mean over prompts of the mean over all tokens of the prompt's group.

    L = 1/P Σ_g 1/tokens_g Σ_{i∈g} Σₜ lossᵢₜ. Every prompt weighs the same; the random divisor leaks about 1/G.

    Source: DAPO, arXiv 2503.14476, eq. 8; "prompt average" of ScaleRL, arXiv 2510.13786. Differs from it: in nothing.
    """
    of_group = counts.group_tokens[prepared.group].clamp(min=1)
    return (keep(loss, prepared.mask).sum(1) / of_group).sum() / counts.prompts.clamp(min=1)


def sequence_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Mean over completions of each completion's own token mean.

    L = 1/N Σᵢ 1/|yᵢ| Σₜ lossᵢₜ. Tokens of long completions weigh less: shortens right answers, lengthens wrong ones.

    Source: GRPO, arXiv 2402.03300, eq. 3. Differs from it: over all completions of the step, the same for full groups.
    """
    return _own_means(loss, prepared).sum() / counts.completions.clamp(min=1)


def prompt_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Mean over prompts, of the mean over the prompt's completions, of each completion's own token mean.

    L = 1/P Σ_g 1/G_g Σ_{i∈g} 1/|yᵢ| Σₜ lossᵢₜ. Equals `sequence_mean` while all groups are full; keeps prompts equal
    when they are not.

    Source: GRPO, arXiv 2402.03300, eq. 3, taken literally for each prompt. Differs from it: in nothing.
    """
    of_group = counts.group_completions[prepared.group].clamp(min=1)
    return (_own_means(loss, prepared) / of_group).sum() / counts.prompts.clamp(min=1)


def constant_length_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Mean over completions of each completion's token *sum*, divided by the length cap.

    L = 1/(N · max_tokens) Σᵢ Σₜ lossᵢₜ. Every token weighs the same whatever its completion's length: no length bias.

    Source: Dr. GRPO, arXiv 2503.20783, §3.2 and its listing. Differs from it: in nothing.
    """
    return keep(loss, prepared.mask).sum() / (counts.completions.clamp(min=1) * counts.max_tokens)


def balanced_mean(loss: Float[Tensor, "B T"], prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
    """Token means over the completions with A > 0 and with A < 0 separately, weighted by how many completions are on
    each side.

    L = N₊/(N₊+N₋) · Σ₊ loss / tokens₊ + N₋/(N₊+N₋) · Σ₋ loss / tokens₋. Right and wrong answers of different length
    push equally hard per completion. A completion with A = 0 is on no side; so is its KL.

    Source: Balanced Aggregation, arXiv 2605.04077. Differs from it: the two sets are those of the step, not of one
    group.
    """
    of_completion = keep(loss, prepared.mask).sum(1)
    side = completion_sign(prepared)
    positive = keep(of_completion, side > 0).sum() * counts.positive_completions / counts.positive_tokens.clamp(min=1)
    negative = keep(of_completion, side < 0).sum() * counts.negative_completions / counts.negative_tokens.clamp(min=1)
    return (positive + negative) / (counts.positive_completions + counts.negative_completions).clamp(min=1)


def completion_sign(prepared: Prepared) -> Float[Tensor, " B"]:
    """Sign of each completion's summed advantage: +1, −1 or 0."""
    return prepared.advantage.sum(1).sign()


def count(prepared: Prepared, max_tokens: int) -> StepCounts:
    """The denominators of the optimizer step that these rows make up; with several ranks, the rows of all of them."""
    tokens = prepared.mask.sum(1)
    trained = (tokens > 0).long()
    side = completion_sign(prepared)
    groups = int(prepared.group.max()) + 1
    group_tokens = tokens.new_zeros(groups).index_add(0, prepared.group, tokens)
    group_completions = tokens.new_zeros(groups).index_add(0, prepared.group, trained)
    return StepCounts(
        tokens=tokens.sum(),
        completions=trained.sum(),
        prompts=(group_tokens > 0).sum(),
        positive_tokens=(tokens * (side > 0)).sum(),
        negative_tokens=(tokens * (side < 0)).sum(),
        max_tokens=max_tokens,
        positive_completions=(side > 0).sum(),
        negative_completions=(side < 0).sum(),
        group_tokens=group_tokens,
        group_completions=group_completions,
    )


def _own_means(loss: Float[Tensor, "B T"], prepared: Prepared) -> Float[Tensor, " B"]:
    return keep(loss, prepared.mask).sum(1) / prepared.mask.sum(1).clamp(min=1)
