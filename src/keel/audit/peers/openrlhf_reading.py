"""OpenRLHF's arguments in keel's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.audit.peers.defaults import OPENRLHF
from keel.audit.peers.reading import Notes, Reading
from keel.objectives.advantages import Advantage, GroupStd, TokenWhitening, batch_mean, group_mean, leave_one_out, unscaled, zero
from keel.objectives.aggregate import sequence_mean, token_mean
from keel.objectives.corrections import Correction, MaskToken, TruncateToken
from keel.objectives.kl import LossKL, RewardKL, k1, k2, k3_clamped
from keel.objectives.log_ratios import geometric_mean, token
from keel.objectives.objective import Objective
from keel.objectives.shaping import SoftOverlong
from keel.objectives.surrogates import Clip, DualClip, Surrogate

NAMES = {
    "reinforce": "reinforce_pp", "reinforce_baseline": "reinforce_pp_baseline",
    "rloo": "rloo", "group_norm": "grpo", "dr_grpo": "dr_grpo",
}  # fmt: skip
WHITENED = ("reinforce", "reinforce_baseline")
ADVANTAGES = {
    "reinforce": Advantage(zero, TokenWhitening(0.0)),
    "reinforce_baseline": Advantage(group_mean, TokenWhitening(0.0)),
    "rloo": leave_one_out,
    "group_norm": Advantage(group_mean, GroupStd(1, 1e-9)),
    "dr_grpo": Advantage(group_mean, unscaled),
    "flash_reinforce": Advantage(batch_mean, unscaled),
}


def read_openrlhf(given: Mapping[str, Any], max_tokens: int) -> Reading:
    """The objective of OpenRLHF's arguments, of which only the given ones differ from version 0.11's defaults."""
    notes = Notes({**OPENRLHF, **given}, given)
    sequence = notes["actor.policy_loss_type"] == "gspo"
    by_token = notes["actor.loss_agg_mode"] == "token-mean" and not sequence
    estimator = notes["algo.advantage.estimator"]
    objective = Objective(
        advantage=notes.choose("algo.advantage.estimator", ADVANTAGES, ("gae",)) or leave_one_out,
        log_ratio=geometric_mean if sequence else token,
        surrogate=_surrogate(notes),
        corrections=_corrections(notes),
        reward_kl=_reward_kl(notes, estimator),
        loss_kl=_loss_kl(notes, by_token),
        aggregate=token_mean if by_token else sequence_mean,
        shaping=_shaping(notes, max_tokens),
        entropy_coef=notes["actor.entropy_coef"] or 0.0,
    )
    if notes["actor.entropy_coef"] and not by_token:
        notes.unlike("actor.entropy_coef", "the bonus is a token mean, whatever the policy loss divides by")
    if sequence:
        notes.unused(["actor.loss_agg_mode"], "policy_loss_type gspo averages each completion by itself")
    named = "gspo" if sequence else NAMES.get(estimator, "")
    return Reading(objective, named, False, 1, tuple(notes.beyond), tuple(notes.idle), tuple(notes.warnings))


def _surrogate(notes: Notes) -> Surrogate:
    low, high = notes["actor.eps_clip_low_high"] or (notes["actor.eps_clip"],) * 2
    dual = notes["actor.dual_clip"]
    return Clip(low, high) if dual is None else DualClip(low, high, dual)


def _corrections(notes: Notes) -> tuple[Correction, ...]:
    knob = "algo.advantage.is_correction_level"
    low, high = notes["algo.advantage.is_correction_threshold"]
    if notes[knob] == "off":
        return ()
    if notes["actor.policy_loss_type"] == "gspo":
        notes.unlike(knob, "gspo takes its ratio against the engine's log-probabilities")
        return ()
    if notes[knob] == "seq" or notes["algo.advantage.is_correction_gating"] != "ratio":
        notes.unlike(knob, "survivors of a filter keep their token weight, without a cap")
        return ()
    if notes["algo.advantage.is_correction_mode"] == "mask":
        return (MaskToken(low, high),)
    if low > 0:
        notes.unlike("algo.advantage.is_correction_threshold", f"weights below {low:g} are raised to it")
    return (TruncateToken(high),)


def _reward_kl(notes: Notes, estimator: str) -> RewardKL | None:
    if notes["algo.kl.use_loss"] or not notes["algo.kl.init_coef"] > 0:
        return None
    chosen = notes.choose("algo.kl.estimator", {"k1": k1, "k2": k2, "k3": k3_clamped})
    if estimator == "reinforce_baseline":
        notes.unlike("algo.kl.init_coef", "the KL is paid after the baseline and before the whitening")
    return RewardKL(notes["algo.kl.init_coef"], chosen, to_go=True, after_normalising=estimator not in WHITENED)


def _loss_kl(notes: Notes, by_token: bool) -> LossKL | None:
    if not notes["algo.kl.use_loss"] or not notes["algo.kl.init_coef"] > 0:
        return None
    if not by_token:
        notes.unlike("algo.kl.use_loss", "the KL is a token mean, whatever the policy loss divides by")
    if notes["algo.kl.unbiased_gradient"]:
        notes.unlike("algo.kl.unbiased_gradient", "the gradient is π/π_old times that of k2")
    return LossKL(notes["algo.kl.init_coef"], notes.choose("algo.kl.estimator", {"k1": k1, "k2": k2, "k3": k3_clamped}))


def _shaping(notes: Notes, max_tokens: int) -> tuple:
    if notes["reward.stop_properly_penalty_coef"] is not None:
        notes.unlike("reward.stop_properly_penalty_coef", "rewards of truncated completions are scaled or replaced")
    buffer = notes["reward.overlong_buffer_len"]
    return () if buffer is None else (SoftOverlong(buffer / max_tokens, notes["reward.overlong_penalty_factor"]),)
