"""keel's objectives in verl: policy losses and advantage estimators in verl's own two registries, under the name keel_RECIPE.

verl calls an estimator with the rewards of the whole batch, and a policy loss with a micro-batch and the numbers of the whole
mini-batch over all ranks (`config.global_batch_info`): those are the denominators. What verl adds to a policy loss by itself,
the KL and the entropy bonus, stays verl's; so does a KL in the reward. `settings` says which of verl's knobs a recipe takes,
and a policy loss refuses a configuration that says otherwise, since it would be another objective. The engine gap reaches a
policy loss as the logarithm of verl's own correction weights: token weights whose bound does not bind.

VERL_USE_EXTERNAL_MODULES=keel.integrations.verl_plugin, or keel installed beside verl, registers every recipe that verl can hold;
`register` one of your own. Written for verl 0.9.1: trainer/ppo/core_algos.py, workers/utils/losses.py.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.audit.peers.defaults import VERL_VERSION
from keel.audit.peers.verl_reading import ACTOR, CORRECTION, KEELS, MODE
from keel.errors import KeelError
from keel.integrations.objectives import reads_gap, refuse_beyond, rows_of
from keel.objectives.aggregate import constant_length_mean, sequence_mean, token_mean
from keel.objectives.kl import LossKL, RewardKL, k1, k2, k3, k3_clamped, per_token
from keel.objectives.objective import Objective
from keel.objectives.registry import Recipe
from keel.objectives.shaping import OverlongFilter
from keel.objectives.signals import Prepared, Scored, keep
from keel.types import StepCounts

AGGREGATES = {
    token_mean: "token-mean",
    sequence_mean: "seq-mean-token-mean",
    constant_length_mean: "seq-mean-token-sum-norm",
}
KL_NAMES = {k1: "kl", k2: "mse", k3: "low_var_kl", k3_clamped: "low_var_kl"}
IDLE_BOUND = 1e9  # above every weight that verl lets through, e^20

Loss = Callable[..., tuple[Tensor, dict[str, Any]]]
Estimator = Callable[..., tuple[Tensor, Tensor]]


def register(recipe: Recipe) -> str:
    """Make a recipe known to verl, as a policy loss and as an advantage estimator; gives back the name of both.

    Raises:
        KeelError: verl is missing or another version, or the recipe has what verl hands neither of them.
    """
    _refuse_version()
    refuse_beyond("verl", recipe.name, beyond(recipe.objective))
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    register_policy_loss(name_of(recipe))(policy_loss(recipe))
    register_adv_est(name_of(recipe))(advantage_estimator(recipe.objective))
    return name_of(recipe)


def name_of(recipe: Recipe) -> str:
    """What a recipe is called in verl's registries."""
    return KEELS + recipe.name


def beyond(objective: Objective) -> list[str]:
    """What verl hands neither to a policy loss nor to an advantage estimator, each in a phrase; empty when it can hold all."""
    reward, loss = objective.reward_kl, objective.loss_kl
    found = {
        "its aggregate needs counts of each group or sign": objective.aggregate not in AGGREGATES,
        "a correction takes tokens out of the denominators": any(c.leaves for c in objective.corrections),
        "verl does not say which completions were cut off": any(isinstance(s, OverlongFilter) for s in objective.shaping),
        "the KL in its loss has a ratio or a level of its own": loss is not None and (loss.ratio or loss.level is not per_token),
        "the KL in its reward has a level of its own": reward is not None and reward.level is not per_token,
        "the KL in its reward is paid after normalising": reward is not None and reward.after_normalising,
        "verl clamps k3 in the reward": reward is not None and reward.estimator is k3,
    }
    return [phrase for phrase, holds in found.items() if holds]


def settings(recipe: Recipe, max_tokens: int | None) -> dict[str, Any]:
    """The knobs of verl, by dotted name, with which its own parts of the objective are the recipe's; it clamps k3 in the loss.

    Args:
        max_tokens: `data.max_response_length`.
    """
    objective = recipe.objective
    knobs = {"algorithm.adv_estimator": name_of(recipe), MODE: name_of(recipe), "data.max_response_length": max_tokens}
    knobs |= {ACTOR + "loss_agg_mode": AGGREGATES[objective.aggregate], ACTOR + "entropy_coeff": objective.entropy_coef}
    if objective.aggregate is constant_length_mean:
        knobs[ACTOR + "loss_scale_factor"] = max_tokens
    knobs |= loss_kl_knobs(objective.loss_kl) | reward_kl_knobs(objective.reward_kl)
    if reads_gap(objective):
        knobs |= {CORRECTION + "rollout_is": "token", CORRECTION + "rollout_is_threshold": IDLE_BOUND}
    return knobs


def policy_loss(recipe: Recipe) -> Loss:
    """The recipe's policy loss in the signature of verl's: surrogate, corrections and aggregation, without KL and entropy."""
    objective = replace(recipe.objective, loss_kl=None, reward_kl=None, entropy_coef=0.0, shaping=())

    def loss(
        old_log_prob: Float[Tensor, "B T"],
        log_prob: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        _refuse_other_knobs(recipe, loss_agg_mode, config)
        _refuse_missing_gap(recipe, rollout_is_weights)
        mask = response_mask.bool()
        gap = torch.zeros_like(old_log_prob) if rollout_is_weights is None else keep(rollout_is_weights, mask).log()
        batch = rows_of(mask, old_log_prob, old_log_prob - gap)
        prepared = Prepared(advantages, mask, batch.group)
        value = objective.loss(log_prob, torch.zeros_like(log_prob), batch, prepared, _counts(config, mask))
        metrics = _metrics(objective.clipped(log_prob, batch, prepared), old_log_prob - log_prob.detach(), mask)
        return value * config.global_batch_info.get("dp_size", 1), metrics  # verl averages gradients over ranks

    return loss


@cache
def advantage_estimator(objective: Objective) -> Estimator:
    """The objective's shaping and advantages in the signature of verl's: token rewards, KL paid, to (advantage, return)."""

    def estimate(
        token_level_rewards: Float[Tensor, "B T"], response_mask: Tensor, index: Any, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        _refuse_other_reward_kl(objective, config)
        mask = response_mask.bool()
        rewards = keep(token_level_rewards, mask)
        places = {uid: place for place, uid in enumerate(dict.fromkeys(index))}
        group = torch.tensor([places[uid] for uid in index], device=mask.device)
        total, counted = rewards.sum(1), mask.new_ones(len(mask), dtype=torch.bool)
        scored, batch = Scored(total, group, counted, mask), rows_of(mask, None, rewards, total, group)
        for shape in objective.shaping:
            scored = shape(scored, batch, mask.shape[1])
        to_go = objective.reward_kl is not None and objective.reward_kl.to_go
        paid = rewards.flip(1).cumsum(1).flip(1) if to_go else total[:, None].expand_as(rewards)
        returns = paid + (scored.reward - total)[:, None]
        return objective.advantage(returns, scored), keep(returns, mask)

    return estimate


def _counts(config: Any, mask: Bool[Tensor, "B T"]) -> StepCounts:
    """Denominators of the mini-batch, as verl hands them in; without them, those of these rows."""
    told, zero = config.global_batch_info, mask.new_zeros((), dtype=torch.long)
    tokens, rows = told.get("batch_num_tokens"), told.get("global_batch_size")
    return StepCounts(
        tokens=mask.sum() if tokens is None else zero + tokens,
        completions=mask.any(1).sum() if rows is None else zero + rows,
        prompts=zero,
        positive_tokens=zero,
        negative_tokens=zero,
        max_tokens=config.loss_scale_factor or mask.shape[1],
        positive_completions=zero,
        negative_completions=zero,
        group_tokens=zero[None],
        group_completions=zero[None],
    )


def _metrics(clipped: Tensor, drift: Tensor, mask: Tensor) -> dict[str, float]:
    tokens = mask.sum().clamp(min=1)
    return {"actor/pg_clipfrac": float(clipped.sum() / tokens), "actor/ppo_kl": float(keep(drift, mask).sum() / tokens)}


def loss_kl_knobs(kl: LossKL | None) -> dict[str, Any]:
    if kl is None:
        return {ACTOR + "use_kl_loss": False}
    return {ACTOR + "use_kl_loss": True, ACTOR + "kl_loss_coef": kl.kl_coef, ACTOR + "kl_loss_type": KL_NAMES[kl.estimator]}


def reward_kl_knobs(kl: RewardKL | None) -> dict[str, Any]:
    if kl is None:
        return {"algorithm.use_kl_in_reward": False}
    own = {"algorithm.kl_penalty": KL_NAMES[kl.estimator], "algorithm.kl_ctrl.kl_coef": kl.kl_coef}
    return {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "fixed"} | own


def _refuse_other_knobs(recipe: Recipe, mode: str, config: Any) -> None:
    """The actor's own terms must be the recipe's."""
    cap = config.loss_scale_factor
    wanted = {
        name.removeprefix(ACTOR): value for name, value in settings(recipe, cap).items() if name.startswith(ACTOR) and name != MODE
    }
    found = {name: mode if name == "loss_agg_mode" else getattr(config, name) for name in wanted}
    wrong = [name for name, value in wanted.items() if found[name] != value or value is None]
    if wrong:
        said = ", ".join(f"{ACTOR}{name} is {found[name]}" for name in wrong)
        asked = ", ".join(f"{name}: {'data.max_response_length' if wanted[name] is None else wanted[name]}" for name in wrong)
        raise KeelError(f"{said}, which makes {name_of(recipe)} another objective. Expected {asked}; set that.")


def _refuse_missing_gap(recipe: Recipe, weights: Tensor | None) -> None:
    if weights is None and reads_gap(recipe.objective):
        raise KeelError(
            f"{name_of(recipe)} corrects the engine gap, and verl hands it no weights. Expected {CORRECTION}rollout_is: token, "
            f"with rollout_is_threshold: {IDLE_BOUND:g} so that verl's own bound does not bind."
        )


def _refuse_other_reward_kl(objective: Objective, config: Any) -> None:
    wanted, on = objective.reward_kl is not None, bool(config is not None and config.get("use_kl_in_reward", False))
    if config is not None and wanted != on:
        raise KeelError(
            f"algorithm.use_kl_in_reward is {on}, and the objective has {'a' if wanted else 'no'} KL in its reward. Expected "
            f"{', '.join(f'{name}: {value}' for name, value in reward_kl_knobs(objective.reward_kl).items())}; set that."
        )


def _refuse_version() -> None:
    try:
        found = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError as missing:
        raise KeelError(
            "Registering losses with verl needs verl, which is not installed. Install it: "
            f"pip install --no-deps verl=={VERL_VERSION}, and what it asks for."
        ) from missing
    if found.split(".")[:2] != VERL_VERSION.split(".")[:2]:
        raise KeelError(
            f"verl {found} is installed. Expected 0.9, for which this adapter was written: pip install verl=={VERL_VERSION}."
        )
