"""keel's words in TRL's: the knobs of a GRPOConfig that come nearest to an objective and a run. The reading of
`keel.audit.peers.trl_reading` the other way round; what is not said here, the reading back shows.
"""

from __future__ import annotations

import math
from typing import Any

from keel.audit.peers.trl_reading import LOSSES
from keel.config import RunConfig
from keel.objectives.advantages import Advantage, GroupStd, RawBatchStd, unscaled
from keel.objectives.corrections import Correction, MaskSequence, MaskToken, OffPolicyMask, TruncateSequence, TruncateToken
from keel.objectives.kl import LossKL
from keel.objectives.log_ratios import geometric_mean
from keel.objectives.objective import Objective
from keel.objectives.shaping import OverlongFilter
from keel.objectives.surrogates import Cispo, Clip, DualClip, Sapo, Surrogate

VLLM = "vllm_importance_sampling_"
MODES = {
    TruncateToken: "token_truncate",
    MaskToken: "token_mask",
    TruncateSequence: "sequence_truncate",
    MaskSequence: "sequence_mask",
}


def of_objective(objective: Objective) -> dict[str, Any]:
    """The knobs of the loss."""
    knobs: dict[str, Any] = {"loss_type": _loss_type(objective)}
    knobs |= _scale(objective.advantage) | _surrogate(objective.surrogate)
    if objective.log_ratio is geometric_mean:
        knobs["importance_sampling_level"] = "sequence"
    if any(isinstance(shape, OverlongFilter) for shape in objective.shaping):
        knobs["mask_truncated_completions"] = True
    if objective.entropy_coef:
        knobs["entropy_coef"] = objective.entropy_coef
    return knobs | _loss_kl(objective.loss_kl) | _corrections(objective.corrections)


def of_loop(config: RunConfig) -> dict[str, Any]:
    """The knobs of the loop: a micro-batch is one group, an optimizer step `prompts_per_step` of them."""
    train, sampling = config.train, config.sampling
    warm = "constant_with_warmup" if train.lr_schedule == "constant" and train.warmup_steps else train.lr_schedule
    knobs = {
        "num_generations": train.group_size,
        "per_device_train_batch_size": train.group_size,
        "gradient_accumulation_steps": train.prompts_per_step,
        "steps_per_generation": train.prompts_per_step * train.updates_per_batch,
        "max_completion_length": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "max_steps": config.steps,
        "learning_rate": train.lr,
        "lr_scheduler_type": warm,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "adam_epsilon": train.eps,
        "max_grad_norm": train.max_grad_norm or 0.0,
        "seed": config.seed,
    }
    cut = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    return knobs | ({name: value for name, value in cut.items() if value} if sampling.truncated else {})


def _loss_type(objective: Objective) -> str:
    own = {Cispo: "cispo", Sapo: "sapo"}.get(type(objective.surrogate))
    if own and LOSSES[own] is objective.aggregate:
        return own
    return next((name for name in ("grpo", "dapo", "dr_grpo") if LOSSES[name] is objective.aggregate), "dapo")


def _scale(advantage: Any) -> dict[str, Any]:
    scale = advantage.scale if isinstance(advantage, Advantage) else None
    names = {GroupStd: "group", RawBatchStd: "batch"}
    return {"scale_rewards": "none" if scale is unscaled else names.get(type(scale), "none")}


def _surrogate(surrogate: Surrogate) -> dict[str, Any]:
    if isinstance(surrogate, Cispo):
        return {"epsilon_high": surrogate.cap}
    if isinstance(surrogate, Sapo):
        return {"sapo_temperature_pos": surrogate.tau_positive, "sapo_temperature_neg": surrogate.tau_negative}
    if isinstance(surrogate, Clip):
        dual = {"delta": surrogate.dual} if isinstance(surrogate, DualClip) else {}
        return {"epsilon": surrogate.clip_low, "epsilon_high": surrogate.clip_high, **dual}
    return {}


def _loss_kl(kl: LossKL | None) -> dict[str, Any]:
    return {} if kl is None else {"beta": kl.kl_coef, "use_bias_correction_kl": kl.ratio is not None}


def _corrections(corrections: tuple[Correction, ...]) -> dict[str, Any]:
    """Those of the engine gap ask for vLLM: without it TRL knows none."""
    if not corrections:
        return {}
    weighing = next((c for c in corrections if type(c) in MODES), None)
    knobs: dict[str, Any] = {"use_vllm": True, VLLM + "correction": weighing is not None}
    if weighing is not None:
        high = weighing.cap if isinstance(weighing, TruncateToken | TruncateSequence) else weighing.high
        knobs |= {VLLM + "mode": MODES[type(weighing)], VLLM + "clip_max": high if math.isfinite(high) else None}
        if getattr(weighing, "low", 0.0) or not math.isfinite(high):  # TRL wants at least one bound
            knobs[VLLM + "clip_min"] = getattr(weighing, "low", 0.0)
    masked = next((c for c in corrections if isinstance(c, OffPolicyMask)), None)
    if masked is not None:
        knobs |= {"off_policy_mask_threshold": masked.delta, "use_vllm": weighing is not None or masked.against_sampler}
    return knobs
