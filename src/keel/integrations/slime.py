"""keel's objectives as slime's function paths: plain functions that it imports by name, with the recipe in its own arguments.

    --loss-type custom_loss --custom-loss-function-path keel.integrations.slime.loss
    --custom-reward-post-process-path keel.integrations.slime.advantages
    --custom-config-path keel.yaml        # one line: keel_recipe: dapo

slime hands a loss the logits of packed sequences, divides what it gives back by the completions of the step on all ranks, or by
its trained tokens under --calculate-per-token-loss: those are the denominators. Advantages are made where rewards are
processed, of the whole rollout batch, and slime's estimator "grpo" spreads them over the tokens. Log-probabilities are read off
the logits here, so neither tensor nor context parallelism may cut them.

Source of the interface: THUDM/slime, docs/en/get_started/customization.md at 138eb42 and slime/backends/megatron_utils/loss.py at
00c2d6d. Written from these, not run inside slime.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keel.errors import KeelError
from keel.integrations.objectives import objective_of, refuse_beyond, rows_of
from keel.objectives.aggregate import constant_length_mean, sequence_mean, token_mean
from keel.objectives.objective import Objective
from keel.objectives.shaping import OverlongFilter
from keel.objectives.signals import Prepared, Scored
from keel.types import StepCounts


def loss(
    args: Any, batch: dict[str, Any], logits: Float[Tensor, "1 L V"], sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """A recipe's loss of one micro-batch, before slime divides it.

    Args:
        args: slime's own, `keel_recipe` among them; batch: lists with an entry for each completion.
    """
    objective = _objective(args)
    refuse_beyond("slime", args.keel_recipe, beyond(objective))
    _refuse_cut_logits(args, objective)
    lengths = batch["response_lengths"]
    rows = [
        _log_probabilities(chunk / args.rollout_temperature, tokens[-length:])
        for chunk, tokens, length in zip(_responses(logits[0], batch), batch["unconcat_tokens"], lengths, strict=True)
    ]
    logp, entropy = (pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    mask = pad_sequence([m.bool() for m in batch["loss_masks"]], batch_first=True)
    old, ref, sampled = (_padded(batch, name, mask) for name in ("log_probs", "ref_log_probs", "rollout_log_probs"))
    current = logp.detach() if old is None else old
    seen = replace(rows_of(mask, old, current if sampled is None else sampled), logp_ref=ref)
    prepared = Prepared(_padded(batch, "advantages", mask), mask, seen.group)
    value = objective.loss(logp, entropy, seen, prepared, _sums(args, mask))
    clipped = objective.clipped(logp, seen, prepared).sum() / mask.sum().clamp(min=1)
    return value, {"loss": value.detach().clone(), "pg_clipfrac": clipped}


def advantages(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """(raw rewards, advantages) of a rollout batch; groups are those of `group_index`.

    Args:
        samples: slime's, of which `group_index`, `response_length`, `loss_mask`, `status` and `get_reward_value` are read.
    """
    objective = _objective(args)
    refuse_beyond("slime", args.keel_recipe, beyond(objective))
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    reward, length = torch.tensor(raw, dtype=torch.float64), torch.tensor([sample.response_length for sample in samples])
    mask = torch.arange(max(1, int(length.max()))) < length[:, None]
    group = torch.tensor([sample.group_index for sample in samples])
    scored = Scored(reward, group, torch.ones_like(reward, dtype=torch.bool), mask)
    batch = rows_of(mask, None, torch.zeros(mask.shape, dtype=torch.float64), reward, group)
    for shape in objective.shaping:
        scored = shape(scored, batch, args.rollout_max_response_len)
    made = objective.advantage(scored.reward[:, None].expand(mask.shape), scored)
    return raw, made[:, 0].tolist()


def beyond(objective: Objective) -> list[str]:
    """What slime does not hand to these functions, each in a phrase."""
    found = {
        "its aggregate needs counts of each group or sign": objective.aggregate not in SUMS,
        "its KL is in the reward": objective.reward_kl is not None,
        "a correction takes tokens out of the denominators": any(c.leaves for c in objective.corrections),
        "truncated completions leave the loss": any(isinstance(s, OverlongFilter) for s in objective.shaping),
    }
    return [phrase for phrase, holds in found.items() if holds]


SUMS = (sequence_mean, constant_length_mean, token_mean)


def _objective(args: Any) -> Objective:
    name = getattr(args, "keel_recipe", None)
    if name is None:
        raise KeelError("slime's arguments name no recipe. Expected a line `keel_recipe: dapo` in --custom-config-path's file.")
    return objective_of(name)


def _refuse_cut_logits(args: Any, objective: Objective) -> None:
    cut = [name for name in ("tensor_model_parallel_size", "context_parallel_size") if getattr(args, name, 1) > 1]
    if cut:
        found = f"{cut[0]} is {getattr(args, cut[0])}, which cuts the logits"
        raise KeelError(f"{found}. Expected 1: keel reads log-probabilities off them.")
    by_tokens = bool(getattr(args, "calculate_per_token_loss", False))
    if by_tokens != (objective.aggregate is token_mean):
        wanted = "with" if objective.aggregate is token_mean else "without"
        raise KeelError(
            f"{args.keel_recipe} is a {objective.aggregate.__name__}, and slime divides by "
            f"{'tokens' if by_tokens else 'completions'}. Expected a run {wanted} --calculate-per-token-loss."
        )


def _responses(logits: Float[Tensor, "L V"], batch: dict[str, Any]) -> list[Float[Tensor, "T V"]]:
    """The logits of each completion's tokens: those of the place before it."""
    ends = torch.tensor(batch["total_lengths"]).cumsum(0).tolist()
    return [logits[end - length - 1 : end - 1] for end, length in zip(ends, batch["response_lengths"], strict=True)]


def _log_probabilities(logits: Float[Tensor, "T V"], tokens: Int[Tensor, " T"]) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of each token in nats."""
    every = logits.log_softmax(-1)
    return every.gather(1, tokens[:, None])[:, 0], -(every.exp() * every).sum(-1)


def _padded(batch: dict[str, Any], name: str, mask: Tensor) -> Float[Tensor, "B T"] | None:
    return pad_sequence(list(batch[name]), batch_first=True).to(mask.device) if batch.get(name) else None


def _sums(args: Any, mask: Tensor) -> StepCounts:
    """Denominators of 1: slime divides by the step's own after this."""
    one = mask.new_ones((), dtype=torch.long)
    return StepCounts(one, one, one, one, one, args.rollout_max_response_len, one, one, one[None], one[None])
