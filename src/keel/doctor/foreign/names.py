"""What the metrics of other frameworks mean, in keel's names. Data: a mapping is one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Framework = Literal["trl", "verl"]


@dataclass(frozen=True)
class Meaning:
    """One number of another framework's log.

    Args:
        theirs: its name there.
        ours: the same number's name here.
        means: what it is, and where it differs from ours.
        scale, shift: ours = scale · theirs + shift.
    """

    theirs: str
    ours: str
    means: str
    scale: float = 1.0
    shift: float = 0.0


TRL = (
    Meaning("reward", "reward/mean", "weighted sum of all reward functions, completions without a reward left out"),
    Meaning("reward_std", "reward/std", "divided by n − 1, ours by n"),
    Meaning("frac_reward_zero_std", "group/zero_advantage_frac", "share of completions whose group has equal rewards"),
    Meaning("frac_reward_zero_std", "group/live_frac", "1 − it: the same where rewards are 0 or 1 and nothing else", -1.0, 1.0),
    Meaning("completions/mean_length", "length/mean", "the same"),
    Meaning("completions/max_length", "length/max", "the same"),
    Meaning("completions/clipped_ratio", "length/truncated_frac", "completions whose last token is no end token"),
    Meaning("entropy", "policy/entropy_nats", "token mean at the update's own forward pass"),
    Meaning("clip_ratio/region_mean", "policy/clip_frac", "tokens outside the clip range on the side where it binds"),
    Meaning("cispo_clip_ratio", "policy/clip_frac", "tokens whose weight is capped, with advantage > 0"),
    Meaning("kl", "kl/ref_k3_nats", "k3 to the reference; there only where beta > 0"),
    Meaning("sampling/sampling_logp_difference/max", "gap/max_abs_nats", "the same; mean over logged steps"),
    Meaning("loss", "train/loss", "mean over the logged micro-steps"),
    Meaning("grad_norm", "train/grad_norm", "before clipping, of the last step that was logged"),
    Meaning("learning_rate", "train/lr", "the same"),
    Meaning("epoch", "train/epoch", "the same"),
    Meaning("step_time", "time/step_s", "the same"),
)
VERL = (
    Meaning("critic/score/mean", "reward/mean", "before a KL penalty, completions without tokens left out"),
    Meaning("critic/advantages/mean", "advantage/mean", "the same"),
    Meaning("response_length/mean", "length/mean", "completions without tokens included"),
    Meaning("response_length/max", "length/max", "the same"),
    Meaning(
        "response_length/clip_ratio", "length/truncated_frac", "as long as the padded batch: one that ends just there counts too"
    ),
    Meaning("actor/entropy", "policy/entropy_nats", "at the sampling weights, averaged as the loss is"),
    Meaning("actor/pg_clipfrac", "policy/clip_frac", "mean over micro-batches; both sides of the clip"),
    Meaning("actor/ppo_kl", "policy/log_ratio_mean_nats", "logp_old − logp: the sign is the other", -1.0),
    Meaning("actor/kl_loss", "kl/ref_k3_nats", "by the estimator of kl_loss_type; k3 (clamped) for low_var_kl alone"),
    Meaning("actor/pg_loss", "train/loss", "the policy's part alone, without KL and entropy"),
    Meaning("actor/grad_norm", "train/grad_norm", "before clipping, mean over the batch's updates"),
    Meaning("actor/lr", "train/lr", "the same"),
    Meaning("rollout_corr/kl", "gap/mean_nats", "logp_rollout − logp_old: the sign is the other", -1.0),
    Meaning("rollout_corr/k3_kl", "gap/k3_nats", "the same"),
    Meaning("rollout_corr/rollout_is_eff_sample_size", "gap/ess_frac", "of weights that are already capped"),
    Meaning("training/rollout_actor_probs_pearson_corr", "gap/pearson", "the same"),
    Meaning("training/epoch", "train/epoch", "the same"),
    Meaning("timing_s/gen", "time/rollout_s", "the same"),
    Meaning("timing_s/reward", "time/reward_s", "the same"),
    Meaning("timing_s/update_actor", "time/train_s", "the same"),
    Meaning("timing_s/step", "time/step_s", "the same"),
)
FRAMEWORKS: Mapping[Framework, tuple[Meaning, ...]] = {"trl": TRL, "verl": VERL}
WITHOUT_LOG = {  # a number of ours that a log may lack: what cannot be known then
    "length/truncated_frac": "whether the cap cuts answers off",
    "group/zero_advantage_frac": "how many groups give no signal",
    "policy/log_ratio_mean_nats": "whether the ratio moves between updates of a batch (clipping may be 0 with a healthy ratio)",
    "gap/k3_nats": "whether engine and trainer agree",
    "policy/entropy_nats": "how much choice is left in sampling",
}
NEVER_IN_A_LOG = (
    "whether scores belong to their completions, masks to their tokens, and the grader is right: ask for completions, or "
    "`keel doctor CONFIG` on the same task"
)


def in_our_names(framework: Framework, numbers: Mapping[str, float]) -> dict[str, float]:
    """One row of a log under keel's names; numbers that have none are left out."""
    return {m.ours: m.scale * numbers[m.theirs] + m.shift for m in FRAMEWORKS[framework] if m.theirs in numbers}


def recognised(names: set[str]) -> Framework | None:
    """Whose names these are, by the most that are known; None where nobody's are."""
    hits = {name: sum(m.theirs in names for m in table) for name, table in FRAMEWORKS.items()}
    best = max(hits, key=lambda name: hits[name])
    return best if hits[best] >= 2 else None
