"""A verl configuration in keel's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.audit.peers.defaults import VERL
from keel.audit.peers.reading import ON_POLICY, Notes, Reading
from keel.errors import KeelError
from keel.objectives.advantages import (
    Advantage,
    GroupStd,
    TokenWhitening,
    group_mean,
    leave_one_out,
    unscaled,
    zero,
)
from keel.objectives.aggregate import constant_length_mean, sequence_mean, token_mean
from keel.objectives.corrections import (
    Correction,
    MaskSequence,
    MaskToken,
    RejectGeometric,
    TruncateSequence,
    TruncateToken,
)
from keel.objectives.kl import LossKL, RewardKL, k1, k2, k3, k3_clamped
from keel.objectives.log_ratios import geometric_mean, token
from keel.objectives.objective import Objective
from keel.objectives.recipes import recipe
from keel.objectives.shaping import SoftOverlong
from keel.objectives.surrogates import Cispo, Clip, DualClip, Gmpo, Reinforce, Sapo, Surrogate

ACTOR = "actor_rollout_ref.actor."
MODE = ACTOR + "policy_loss.loss_mode"
CORRECTION = "algorithm.rollout_correction."
BUFFER = "reward.reward_kwargs.overlong_buffer_cfg."
KEELS = "keel_"  # what keel's recipes are called in verl's registries
OTHER_ESTIMATORS = (
    "gae", "remax", "opo", "grpo_passk", "gpg", "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline",
)  # fmt: skip
OTHER_MODES = ("dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro", "bypass_mode")
AGGREGATES = {
    "token-mean": token_mean,
    "seq-mean-token-mean": sequence_mean,
    "seq-mean-token-sum-norm": constant_length_mean,
    "seq-mean-token-sum": constant_length_mean,
    "token-sum": token_mean,
}
ESTIMATORS = {"kl": k1, "k1": k1, "mse": k2, "k2": k2, "low_var_kl": k3_clamped, "k3": k3_clamped}


def read_verl(given: Mapping[str, Any]) -> Reading:
    """The objective of a verl configuration by dotted names, of which only the given ones differ from verl 0.9.1's defaults."""
    notes = Notes({**VERL, **given}, given)
    updates = _updates(notes)
    mode = notes[MODE]
    if str(mode).startswith(KEELS):
        return _keels(notes, mode.removeprefix(KEELS), updates)
    objective = Objective(
        advantage=_advantage(notes),
        log_ratio=geometric_mean if mode == "gspo" else token,
        surrogate=_surrogate(notes),
        corrections=_corrections(notes),
        reward_kl=_reward_kl(notes),
        loss_kl=_loss_kl(notes),
        aggregate=_aggregate(notes),
        shaping=_shaping(notes),
        entropy_coef=float(notes[ACTOR + "entropy_coeff"]),
    )
    _note_sampling(notes)
    _note_idle(notes, updates)
    dynamic = bool(notes["algorithm.filter_groups.enable"])
    return Reading(objective, _named(notes), dynamic, updates, tuple(notes.beyond), tuple(notes.idle), tuple(notes.warnings))


def _keels(notes: Notes, name: str, updates: int) -> Reading:
    """keel's own loss in verl's registry: a recipe by its name, which refuses to run under knobs that are not its own."""
    own = recipe(name).objective
    if notes["algorithm.adv_estimator"] != KEELS + name:
        notes.unlike("algorithm.adv_estimator", f"advantages are not those of {name}: expected {KEELS + name}")
    if own.loss_kl is not None and own.loss_kl.estimator is k3:
        notes.unlike(ACTOR + "kl_loss_type", "verl clamps k3 to ±10")
    _note_sampling(notes)
    return Reading(own, name, bool(notes["algorithm.filter_groups.enable"]), updates, tuple(notes.beyond))


def _named(notes: Notes) -> str:
    of_mode = {"gspo": "gspo", "sapo": "sapo", "cispo": "cispo", "geo_mean": "gmpo"}
    if notes[MODE] in of_mode:
        return of_mode[notes[MODE]]
    estimator = notes["algorithm.adv_estimator"]
    if estimator in ("grpo", "grpo_vectorized"):
        if notes["algorithm.filter_groups.enable"] or notes[BUFFER + "enable"]:
            return "dapo"
        return "grpo" if notes["algorithm.norm_adv_by_std_in_grpo"] else "dr_grpo"
    names = {"rloo": "rloo", "rloo_vectorized": "rloo", "reinforce_plus_plus": "reinforce_pp"}
    return {**names, "reinforce_plus_plus_baseline": "reinforce_pp_baseline"}.get(estimator, "")


def _advantage(notes: Notes) -> Advantage:
    knob, divides = "algorithm.adv_estimator", notes["algorithm.norm_adv_by_std_in_grpo"]
    choices = {
        "grpo": Advantage(group_mean, GroupStd(1, 1e-6) if divides else unscaled),
        "grpo_vectorized": Advantage(group_mean, GroupStd(1, 1e-6)),
        "rloo": leave_one_out,
        "rloo_vectorized": leave_one_out,
        "reinforce_plus_plus": Advantage(zero, TokenWhitening()),
        "reinforce_plus_plus_baseline": Advantage(group_mean, TokenWhitening()),
    }
    if notes[knob] not in ("grpo",):
        notes.unused(["algorithm.norm_adv_by_std_in_grpo"], f"only adv_estimator grpo reads it, and this is {notes[knob]}")
    if notes[knob].startswith("reinforce_plus_plus"):
        notes.unlike(knob, "whitens with Bessel's correction: advantages are √(1 − 1/tokens) times keel's")
    if notes[knob] == "reinforce_plus_plus" and notes["algorithm.gamma"] != 1:
        notes.unlike("algorithm.gamma", "rewards are discounted")
    return notes.choose(knob, choices, OTHER_ESTIMATORS) or Advantage(group_mean, unscaled)


def _surrogate(notes: Notes) -> Surrogate:
    low, high = (notes[ACTOR + name] for name in ("clip_ratio_low", "clip_ratio_high"))
    both = notes[ACTOR + "clip_ratio"]
    low, high = both if low is None else low, both if high is None else high
    if notes[MODE] == "cispo" and low < 1:
        notes.unlike(ACTOR + "clip_ratio_low", f"importance weights are raised to at least {1 - low:g}; 1.0 switches that off")
    if notes[MODE] == "geo_mean" and low != high:
        notes.unlike(ACTOR + "clip_ratio_low", "the two bounds of |log r| differ")
    choices = {
        "vanilla": lambda: DualClip(low, high, notes[ACTOR + "clip_ratio_c"]),
        "gspo": lambda: Clip(low, high),
        "cispo": lambda: Cispo.one_plus(high),
        "sapo": lambda: Sapo(notes[ACTOR + "tau_pos"], notes[ACTOR + "tau_neg"]),
        "geo_mean": lambda: Gmpo(high),
        "gpg": Reinforce,
    }
    make = notes.choose(MODE, choices, OTHER_MODES)
    return make() if make else DualClip(low, high, notes[ACTOR + "clip_ratio_c"])


def _aggregate(notes: Notes) -> Any:
    knob, mode = ACTOR + "loss_agg_mode", notes[MODE]
    aggregate, cap = notes.choose(knob, AGGREGATES), notes["data.max_response_length"]
    if mode in ("sapo", "geo_mean"):
        notes.unused([knob, ACTOR + "loss_scale_factor"], f"loss_mode {mode} averages each completion by itself")
        if mode == "geo_mean":
            notes.unlike(MODE, "averages over the rows of each micro-batch, not of the step")
        if aggregate is not sequence_mean and notes[ACTOR + "use_kl_loss"]:
            notes.unlike(knob, f"holds for the KL loss only; loss_mode {mode} averages each completion by itself")
        return sequence_mean
    factor = notes[ACTOR + "loss_scale_factor"]
    if notes[knob] == "token-sum":
        notes.unlike(knob, "tokens are summed, not averaged")
    if notes[knob] == "seq-mean-token-sum":
        notes.unlike(knob, f"the divisor is 1, not max_response_length: {cap} times the gradient")
    elif aggregate is constant_length_mean and factor not in (None, cap):
        times = f"{cap / factor:g} times the gradient"
        notes.unlike(ACTOR + "loss_scale_factor", f"divides by {factor}, not by max_response_length: {times}")
    elif aggregate is constant_length_mean and factor is None:
        notes.warnings.append(
            "loss_scale_factor is null: token sums are divided by the width that each micro-batch is padded to, which need not "
            f"be the same for all. Set loss_scale_factor: {cap}."
        )
    if notes[knob] != "seq-mean-token-sum-norm":
        notes.unused([ACTOR + "loss_scale_factor"], "only seq-mean-token-sum-norm divides by it")
    return aggregate


def _reward_kl(notes: Notes) -> RewardKL | None:
    if not notes["algorithm.use_kl_in_reward"]:
        notes.unused([n for n in VERL if n.startswith("algorithm.kl_")], "use_kl_in_reward is off")
        return None
    estimator = notes.choose("algorithm.kl_penalty", ESTIMATORS, ("abs", "full"))
    if notes["algorithm.kl_ctrl.type"] == "adaptive":
        notes.unlike("algorithm.kl_ctrl.type", "the coefficient follows a target KL")
    else:
        notes.unused(["algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"], "kl_ctrl.type is fixed")
    to_go = notes["algorithm.adv_estimator"] == "reinforce_plus_plus"
    return RewardKL(notes["algorithm.kl_ctrl.kl_coef"], estimator or k1, to_go=to_go)


def _loss_kl(notes: Notes) -> LossKL | None:
    if not notes[ACTOR + "use_kl_loss"]:
        notes.unused([ACTOR + "kl_loss_coef", ACTOR + "kl_loss_type"], "use_kl_loss is off")
        return None
    knob = ACTOR + "kl_loss_type"
    if str(notes[knob]).endswith("+"):
        notes.unlike(knob, "its value is shown, and the gradient is k2's")
        return LossKL(notes[ACTOR + "kl_loss_coef"], k2)
    estimator = notes.choose(knob, ESTIMATORS, ("abs", "full"))
    if estimator is k1:
        notes.warnings.append("kl_loss_type kl (k1) in the loss has an expected gradient of zero on-policy: it restrains nothing.")
    return LossKL(notes[ACTOR + "kl_loss_coef"], estimator or k2)


def _corrections(notes: Notes) -> tuple[Correction, ...]:
    level, rejects = notes[CORRECTION + "rollout_is"], notes[CORRECTION + "rollout_rs"]
    if not level:
        notes.unused([CORRECTION + "rollout_is_threshold", CORRECTION + "rollout_is_batch_normalize"], "rollout_is is off")
    if not rejects:
        notes.unused([CORRECTION + "rollout_rs_threshold"], "rollout_rs is off")
    if not notes[CORRECTION + "bypass_mode"]:
        notes.unused([CORRECTION + "loss_type"], "bypass_mode is off")
    else:
        notes.unlike(CORRECTION + "bypass_mode", "the engine's log-probabilities stand in for the trainer's old ones")
    if (level or rejects) and not notes["actor_rollout_ref.rollout.calculate_log_probs"]:
        raise KeelError(
            "rollout_correction is on and rollout.calculate_log_probs off. Expected the engine's log-probabilities: set it true."
        )
    weighing = [_weighing(notes, level)] if level else []
    return (*weighing, *([_rejecting(notes, rejects)] if rejects == "seq_mean_k1" else _unknown_rejection(notes, rejects)))


def _weighing(notes: Notes, level: str) -> Correction:
    if notes[CORRECTION + "rollout_is_batch_normalize"]:
        notes.unlike(CORRECTION + "rollout_is_batch_normalize", "weights are divided by their mean over the batch")
    bounds = _bounds(notes[CORRECTION + "rollout_is_threshold"])
    truncate, mask = notes.choose(
        CORRECTION + "rollout_is", {"token": (TruncateToken, MaskToken), "sequence": (TruncateSequence, MaskSequence)}
    )
    return truncate(bounds[0]) if len(bounds) == 1 else mask(*bounds)


def _rejecting(notes: Notes, rejects: str) -> Correction:
    bounds = _bounds(notes[CORRECTION + "rollout_rs_threshold"])
    low, high = bounds if len(bounds) == 2 else (1 / bounds[0], bounds[0])
    return RejectGeometric(low, high, leaves=True)


def _unknown_rejection(notes: Notes, rejects: str | None) -> list[Correction]:
    if rejects:
        notes.unlike(CORRECTION + "rollout_rs", f"rejects by {rejects}")
    return []


def _bounds(threshold: Any) -> list[float]:
    try:
        return [float(bound) for bound in str(threshold).split("_")]
    except ValueError as error:
        raise KeelError(f'A threshold of rollout_correction is {threshold!r}. Expected a number, or two as "0.5_5.0".') from error


def _shaping(notes: Notes) -> tuple:
    rest = [name for name in VERL if name.startswith(BUFFER) and not name.endswith("enable")]
    if not notes[BUFFER + "enable"]:
        notes.unused(rest, "overlong_buffer_cfg.enable is off")
        return ()
    if notes["reward.reward_manager.name"] != "dapo":
        because = f"only the dapo reward manager reads it, and reward_manager.name is {notes['reward.reward_manager.name']}"
        notes.unused([BUFFER + "enable", *rest], because)
        return ()
    cap = notes["reward.reward_kwargs.max_resp_len"] or notes["data.max_response_length"]
    return (SoftOverlong(notes[BUFFER + "len"] / cap, notes[BUFFER + "penalty_factor"]),)


def _updates(notes: Notes) -> int:
    prompts, mini = notes["data.train_batch_size"], notes[ACTOR + "ppo_mini_batch_size"]
    if prompts % mini:
        notes.warnings.append(
            f"train_batch_size {prompts} is no multiple of ppo_mini_batch_size {mini}: both count prompts, so the last update is "
            "smaller."
        )
    return max(1, -(-prompts // mini)) * notes[ACTOR + "ppo_epochs"]


def _note_sampling(notes: Notes) -> None:
    top_p, top_k = "actor_rollout_ref.rollout.top_p", "actor_rollout_ref.rollout.top_k"
    for knob, cuts in ((top_p, notes[top_p] < 1), (top_k, notes[top_k] > 0)):
        if cuts:
            notes.unlike(knob, "completions are drawn from a truncated distribution, log-probabilities taken of the whole")


def _note_idle(notes: Notes, updates: int) -> None:
    mode, low, high = notes[MODE], notes[ACTOR + "clip_ratio_low"], notes[ACTOR + "clip_ratio_high"]
    clips = tuple(ACTOR + name for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c"))
    taus = (ACTOR + "tau_pos", ACTOR + "tau_neg")
    if mode in ("sapo", "gpg"):
        notes.unused(clips, f"loss_mode {mode} does not clip")
    if mode != "vanilla":
        notes.unused(clips[-1:], "only loss_mode vanilla clips twice")
    if mode != "sapo":
        notes.unused(taus, "only loss_mode sapo reads it")
    if low is not None and high is not None:
        because = f"clip_ratio_low ({low:g}) and clip_ratio_high ({high:g}) override it, and their default is .2, not null"
        if clips[0] in notes.given and notes.given[clips[0]] not in (low, high) and mode not in ("sapo", "gpg"):
            notes.warnings.append(f"clip_ratio {notes.given[clips[0]]:g} does nothing: {because}. Set those two instead.")
        notes.unused(clips[:1], because)
    if updates == 1:
        notes.unused([*clips, *taus], ON_POLICY)
    for name in VERL:
        owner = {"clip_cov": "clip_cov_", "kl_cov": ("kl_cov_", "ppo_kl_coef"), "dro": "dro_"}
        for one, prefix in owner.items():
            if name.startswith(ACTOR + "policy_loss.") and name.rpartition(".")[2].startswith(prefix) and mode != one:
                notes.unused([name], f"only loss_mode {one} reads it")
    if notes["algorithm.adv_estimator"] != "gae":
        notes.unused(["algorithm.lam", "algorithm.use_pf_ppo", "algorithm.pf_ppo.reweight_method", "algorithm.pf_ppo.weight_pow"],
                     "only adv_estimator gae reads it")  # fmt: skip
        if notes["algorithm.adv_estimator"] not in ("reinforce_plus_plus", "remax"):
            notes.unused(["algorithm.gamma"], f"adv_estimator {notes['algorithm.adv_estimator']} does not discount")
    if not notes["algorithm.filter_groups.enable"]:
        notes.unused(["algorithm.filter_groups.metric"], "filter_groups.enable is off")
