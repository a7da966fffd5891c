"""keel's words in verl's: the knobs of its trainer that come nearest to an objective and a run. The reading of
`keel.audit.peers.verl_reading` the other way round; what is not said here, the reading back shows.
"""

from __future__ import annotations

from typing import Any

from keel.audit.peers.verl_reading import ACTOR, BUFFER, CORRECTION, MODE
from keel.config import RunConfig
from keel.integrations import verl
from keel.objectives.advantages import Advantage, GroupStd, TokenWhitening, group_mean, leave_one_out, unscaled, zero
from keel.objectives.aggregate import constant_length_mean
from keel.objectives.corrections import (
    Correction,
    MaskSequence,
    MaskToken,
    RejectGeometric,
    TruncateSequence,
    TruncateToken,
)
from keel.objectives.log_ratios import geometric_mean
from keel.objectives.objective import Objective
from keel.objectives.registry import Recipe
from keel.objectives.shaping import SoftOverlong
from keel.objectives.surrogates import Cispo, Clip, DualClip, Gmpo, Reinforce, Sapo

ROLLOUT = "actor_rollout_ref.rollout."
LEVELS = {TruncateToken: "token", MaskToken: "token", TruncateSequence: "sequence", MaskSequence: "sequence"}
IDLE_DUAL = 1e9  # a bound that no ratio reaches: verl's vanilla loss always clips twice


def of_objective(objective: Objective, config: RunConfig) -> dict[str, Any]:
    """The knobs of the loss."""
    cap = config.sampling.max_completion_tokens
    knobs: dict[str, Any] = _advantage(objective.advantage) | _surrogate(objective)
    knobs[ACTOR + "loss_agg_mode"] = verl.AGGREGATES.get(objective.aggregate, "token-mean")
    if objective.aggregate is constant_length_mean:
        knobs[ACTOR + "loss_scale_factor"] = cap
    if objective.entropy_coef:
        knobs[ACTOR + "entropy_coeff"] = objective.entropy_coef
    knobs |= verl.loss_kl_knobs(objective.loss_kl) | verl.reward_kl_knobs(objective.reward_kl)
    for correction in objective.corrections:
        knobs |= _correction(correction)
    for shape in objective.shaping:
        knobs |= _overlong(shape, cap) if isinstance(shape, SoftOverlong) else {}
    return knobs


def of_loop(recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    """The knobs of the loop."""
    train, sampling = config.train, config.sampling
    knobs = {
        "data.train_batch_size": train.prompts_per_step * recipe.updates_per_batch,
        "data.max_response_length": sampling.max_completion_tokens,
        ACTOR + "ppo_mini_batch_size": train.prompts_per_step,
        ACTOR + "optim.lr": train.lr,
        ACTOR + "optim.weight_decay": train.weight_decay,
        ACTOR + "grad_clip": train.max_grad_norm,
        ROLLOUT + "n": train.group_size,
        ROLLOUT + "temperature": sampling.temperature,
        "trainer.total_training_steps": -(-config.steps // recipe.updates_per_batch),
    }
    cut = {ROLLOUT + "top_p": sampling.top_p, ROLLOUT + "top_k": sampling.top_k or -1} if sampling.truncated else {}
    groups = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"} if recipe.dynamic_sampling else {}
    return knobs | cut | groups


def _advantage(advantage: Any) -> dict[str, Any]:
    name, knob = "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"
    if advantage == leave_one_out:
        return {name: "rloo"}
    baseline, scale = (advantage.baseline, advantage.scale) if isinstance(advantage, Advantage) else (None, None)
    if isinstance(scale, TokenWhitening) and baseline in (zero, group_mean):
        return {name: "reinforce_plus_plus" if baseline is zero else "reinforce_plus_plus_baseline"}
    return {name: "grpo", knob: scale is not unscaled and isinstance(scale, GroupStd)}


def _surrogate(objective: Objective) -> dict[str, Any]:
    low, high, surrogate = ACTOR + "clip_ratio_low", ACTOR + "clip_ratio_high", objective.surrogate
    if isinstance(surrogate, Cispo):
        return {MODE: "cispo", low: 1.0, high: surrogate.cap - 1}
    if isinstance(surrogate, Sapo):
        return {MODE: "sapo", ACTOR + "tau_pos": surrogate.tau_positive, ACTOR + "tau_neg": surrogate.tau_negative}
    if isinstance(surrogate, Gmpo):
        return {MODE: "geo_mean", low: surrogate.log_clip, high: surrogate.log_clip}
    if isinstance(surrogate, Reinforce):
        return {MODE: "gpg"}
    if not isinstance(surrogate, Clip):
        return {}
    dual = surrogate.dual if isinstance(surrogate, DualClip) else IDLE_DUAL
    bounds = {low: surrogate.clip_low, high: surrogate.clip_high}
    whole = objective.log_ratio is geometric_mean
    return {MODE: "gspo", **bounds} if whole else {MODE: "vanilla", **bounds, ACTOR + "clip_ratio_c": dual}


def _correction(correction: Correction) -> dict[str, Any]:
    on = {ROLLOUT + "calculate_log_probs": True}
    if isinstance(correction, RejectGeometric):
        bounds = f"{correction.low}_{correction.high}"
        return on | {CORRECTION + "rollout_rs": "seq_mean_k1", CORRECTION + "rollout_rs_threshold": bounds}
    if type(correction) not in LEVELS:
        return {}
    cap = getattr(correction, "cap", None)
    bounds = f"{correction.low}_{correction.high}" if cap is None else min(cap, verl.IDLE_BOUND)
    return on | {CORRECTION + "rollout_is": LEVELS[type(correction)], CORRECTION + "rollout_is_threshold": bounds}


def _overlong(shape: SoftOverlong, cap: int) -> dict[str, Any]:
    buffer = {"enable": True, "len": max(1, round(shape.buffer_share * cap)), "penalty_factor": shape.scale}
    return {"reward.reward_manager.name": "dapo"} | {BUFFER + name: value for name, value in buffer.items()}
