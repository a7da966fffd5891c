"""A GRPOConfig in keel's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.audit.peers.defaults import TRL
from keel.audit.peers.reading import ON_POLICY, Notes, Reading
from keel.errors import KeelError
from keel.objectives.advantages import Advantage, GroupStd, RawBatchStd, group_mean, unscaled
from keel.objectives.aggregate import constant_length_mean, sequence_mean, token_mean
from keel.objectives.corrections import (
    Correction,
    MaskSequence,
    MaskToken,
    OffPolicyMask,
    TruncateSequence,
    TruncateToken,
)
from keel.objectives.kl import LossKL, k3
from keel.objectives.log_ratios import geometric_mean, token
from keel.objectives.objective import Objective
from keel.objectives.recipes import RECIPES
from keel.objectives.shaping import OverlongFilter
from keel.objectives.surrogates import Cispo, Clip, DualClip, Reinforce, Sapo, Surrogate

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = {
    "grpo": sequence_mean, "sapo": sequence_mean, "dapo": token_mean, "cispo": token_mean, "bnpo": token_mean, "vespo": token_mean,
    "dr_grpo": constant_length_mean, "luspo": constant_length_mean,
}  # fmt: skip


def read_trl(given: Mapping[str, Any]) -> Reading:
    """The objective of a GRPOConfig, of which only the given knobs differ from TRL 1.16's defaults."""
    notes = Notes({**TRL, **given}, given)
    updates = _updates(notes)
    loss, aggregate = notes["loss_type"], notes.choose("loss_type", LOSSES)
    level = notes.choose("importance_sampling_level", {"token": token, "sequence": geometric_mean})
    surrogate = _surrogate(notes, loss)
    takes_level = surrogate.reads_ratio and not surrogate.token_only
    objective = Objective(
        advantage=_advantage(notes),
        log_ratio=level if takes_level else token,
        surrogate=surrogate,
        corrections=_corrections(notes),
        loss_kl=_loss_kl(notes, level),
        aggregate=aggregate,
        shaping=(OverlongFilter(in_baseline=True),) if notes["mask_truncated_completions"] else (),
        entropy_coef=notes["entropy_coef"],
    )
    _note_denominators(notes, loss)
    _note_sampling(notes)
    _note_idle(notes, loss, updates)
    sequence = level is geometric_mean and loss in ("grpo", "dapo", "bnpo", "dr_grpo")
    named = "gspo" if sequence else loss if loss in RECIPES else ""
    return Reading(objective, named, False, updates, tuple(notes.beyond), tuple(notes.idle), tuple(notes.warnings))


def _advantage(notes: Notes) -> Advantage:
    scales = {"group": GroupStd(1, 1e-4), True: GroupStd(1, 1e-4), "batch": RawBatchStd(1, 1e-4), "none": unscaled, False: unscaled}
    scale = notes.choose("scale_rewards", scales)
    if notes["multi_objective_aggregation"] != "sum_then_normalize":
        notes.unlike("multi_objective_aggregation", "each reward function is normalised on its own, then the sum over the batch")
        notes.unused(["scale_rewards"], "multi_objective_aggregation normalises by itself")
    return Advantage(group_mean, scale)


def _surrogate(notes: Notes, loss: str) -> Surrogate:
    low, high = notes["epsilon"], notes["epsilon_high"]
    high = low if high is None else high
    if loss == "cispo":
        if high < 1:
            notes.unlike("epsilon_high", f"every importance weight is capped at {high:g}, below that of an on-policy token")
            notes.warnings.append(
                f"cispo takes epsilon_high as the cap itself, not as 1 + ε: here all weights are at most {high:g}, which only "
                "shrinks the gradient. Set epsilon_high: 5.0, or 1 + ε."
            )
        return Cispo(max(1.0, high))
    if loss == "sapo":
        return Sapo(notes["sapo_temperature_pos"], notes["sapo_temperature_neg"])
    if loss == "vespo":
        notes.unlike("loss_type", "vespo weighs each completion by a gamma function of its whole ratio")
        return Reinforce()
    if notes["delta"] is None:
        return Clip(low, high)
    if notes["delta"] < 1 + high:
        notes.unlike("delta", f"below 1 + epsilon_high = {1 + high:g} it also caps right answers")
    return DualClip(low, high, max(notes["delta"], 1 + 1e-9))


def _corrections(notes: Notes) -> tuple[Correction, ...]:
    corrections: list[Correction] = []
    if notes["use_vllm"] and notes["vllm_importance_sampling_correction"] and notes["loss_type"] != "vespo":
        corrections += _weighing(notes)
    if notes["off_policy_mask_threshold"] is not None:
        corrections.append(OffPolicyMask(notes["off_policy_mask_threshold"], against_sampler=bool(notes["use_vllm"])))
    return tuple(corrections)


def _weighing(notes: Notes) -> list[Correction]:
    mode, low = notes["vllm_importance_sampling_mode"], notes["vllm_importance_sampling_clip_min"]
    cap = notes["vllm_importance_sampling_cap"]
    high = notes["vllm_importance_sampling_clip_max"] if cap is None else cap
    high = float("inf") if high is None else high
    names = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    notes.choose("vllm_importance_sampling_mode", dict.fromkeys(names))
    if mode.endswith("truncate"):
        if low:
            notes.unlike("vllm_importance_sampling_clip_min", f"weights below {low:g} are raised to it")
        return [TruncateToken(high) if mode == "token_truncate" else TruncateSequence(high)]
    return [(MaskToken if mode == "token_mask" else MaskSequence)(low or 0.0, high)]


def _loss_kl(notes: Notes, level: Any) -> LossKL | None:
    if not notes["beta"]:
        return None
    ratio = level if notes["use_bias_correction_kl"] else None
    if ratio and notes["use_vllm"]:
        notes.unlike("use_bias_correction_kl", "the KL's ratio is π/π_old; keel's is π/μ, the engine gap included")
    return LossKL(notes["beta"], k3, ratio=ratio)


def _note_denominators(notes: Notes, loss: str) -> None:
    if loss == "bnpo":
        notes.unlike("loss_type", "the token mean is taken over each micro-batch, so the loss depends on how the batch is cut")
    if loss == "luspo":
        times = notes["max_completion_length"]
        notes.unlike("loss_type", f"the divisor is 1, not max_completion_length: {times} times the gradient")
    if notes["mask_truncated_completions"] and loss in ("grpo", "sapo", "dr_grpo"):
        notes.unlike("mask_truncated_completions", f"with loss_type {loss} a masked completion still counts in the divisor")
    if loss in ("dapo", "cispo", "vespo") and _steps(notes) > notes["gradient_accumulation_steps"]:
        notes.unlike("loss_type", "the divisor is the rollout batch's token count over its updates, not the update's own count")
    if notes["entropy_coef"]:
        notes.unlike("entropy_coef", f"the bonus is the token mean of each micro-batch, whatever {loss} divides by")
    if notes["use_adaptive_entropy"]:
        notes.unlike("use_adaptive_entropy", "the bonus is switched by the entropy of the last step")
    if notes["top_entropy_quantile"] < 1:
        share = f"{notes['top_entropy_quantile']:.0%}"
        notes.unlike("top_entropy_quantile", f"only {share} of the tokens are trained, those of most entropy")


def _note_sampling(notes: Notes) -> None:
    truncated = {name: notes[name] for name in ("top_p", "top_k", "min_p") if notes[name] != TRL[name]}
    if truncated or notes["repetition_penalty"] != 1.0:
        knob = next(iter(truncated), "repetition_penalty")
        notes.unlike(knob, "completions are drawn from a truncated or penalised distribution, log-probabilities taken of the whole")
    if notes["sync_ref_model"] and notes["beta"]:
        notes.unlike("sync_ref_model", "the reference follows the policy")


def _steps(notes: Notes) -> int:
    """Micro-batches that one rollout batch is cut into; a `generation_batch_size` is read as on one process."""
    steps, size = notes["steps_per_generation"], notes["generation_batch_size"]
    if steps is not None and size is not None:
        raise KeelError("generation_batch_size and steps_per_generation are both set. Expected one: TRL refuses both.")
    if size is not None:
        return max(1, size // notes["per_device_train_batch_size"])
    return notes["gradient_accumulation_steps"] if steps is None else steps


def _updates(notes: Notes) -> int:
    """Optimizer steps of one rollout batch."""
    return max(1, round(_steps(notes) * notes["num_iterations"] / notes["gradient_accumulation_steps"]))


def _note_idle(notes: Notes, loss: str, updates: int) -> None:
    ratio = ("epsilon", "epsilon_high", "delta", "importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg")
    vespo = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    vllm = [name for name in TRL if name.startswith("vllm_importance")]
    for names, owner in ((ratio[-2:], "sapo"), (vespo, "vespo")):
        if loss != owner:
            notes.unused(names, f"only loss_type {owner} reads it")
    shrinks = loss == "cispo" and _cap(notes) < 1
    if loss == "cispo" and notes["epsilon_high"] is not None:
        notes.unused(["epsilon"], "cispo has no lower bound: it reads epsilon_high alone")
    if loss not in CLIPPED:
        notes.unused(["delta", *([] if loss == "cispo" else ["epsilon", "epsilon_high"])], f"loss_type {loss} does not clip")
    if updates == 1:
        still = ratio[:2] if shrinks else ()
        notes.unused([n for n in (*ratio, *vespo) if n not in still], ON_POLICY)
    if not notes["beta"]:
        notes.unused(["beta"] if "beta" in notes.given else [], "0 is the default: no reference model, no KL")
        reference = ("use_bias_correction_kl", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
        notes.unused(reference, "beta is 0: there is no KL")
    if not notes["sync_ref_model"]:
        notes.unused(["ref_model_mixup_alpha", "ref_model_sync_steps"], "sync_ref_model is off")
    if not notes["use_vllm"]:
        notes.unused(vllm, "use_vllm is off: the trainer samples, and there is no engine gap")
        if updates == 1:
            notes.unused(["off_policy_mask_threshold"], "one update a batch and no engine: nothing is off-policy")
    elif not notes["vllm_importance_sampling_correction"]:
        notes.unused([n for n in vllm if not n.endswith("correction")], "vllm_importance_sampling_correction is off")
    if notes["vllm_importance_sampling_cap"] is not None:
        notes.unused(["vllm_importance_sampling_clip_max"], "vllm_importance_sampling_cap, its old name, overrides it")
    if not notes["use_adaptive_entropy"]:
        notes.unused([n for n in TRL if n.startswith("entropy_coef_") or n == "entropy_target"], "use_adaptive_entropy is off")


def _cap(notes: Notes) -> float:
    return notes["epsilon"] if notes["epsilon_high"] is None else notes["epsilon_high"]
