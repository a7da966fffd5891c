"""Every metric by name, with its unit and its meaning in one line. A name that is not here is refused. Makes
docs/metrics.md.

`{k}` stands for a number, `{panel}` for the name of a set of prompts and `{part}` for that of a part of the reward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from keel.errors import KeelError, nearest


@dataclass(frozen=True)
class Metric:
    """A number with a name.

    Args:
        name: family/what_unit; may hold `{k}`, `{panel}` or `{part}`.
        unit: of the number.
        meaning: one line.
    """

    name: str
    unit: str
    meaning: str

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def matches(self, name: str) -> bool:
        """Whether a concrete name is an instance of this one."""
        pattern = re.escape(self.name).replace(r"\{k\}", r"\d+")
        pattern = pattern.replace(r"\{panel\}", r"[\w.:@\-]+").replace(r"\{part\}", r"[\w.\-]+")
        return re.fullmatch(pattern, name) is not None


FAMILIES = {
    "reward": "What the graders said. Unscorable completions count in nothing but their own share.",
    "group": "The completions of one prompt.",
    "length": "Tokens of completions, the end token included.",
    "advantage": "Over trained tokens.",
    "policy": "The trainer now, over trained tokens.",
    "gap": "The trainer at the sampling weights against the engine: logp_old − logp_rollout, over trained tokens.",
    "kl": "The trainer against its reference, over trained tokens.",
    "train": "The optimizer step.",
    "tokens": "Amounts.",
    "sampling": "What it took to fill the batch.",
    "judge": "What a judge behind a server has used up since the run (or its continuation) began, evaluation included.",
    "sync": "Weights on their way to the engine.",
    "moe": "Experts of a mixture-of-experts model, at the tokens from which trained tokens are predicted.",
    "eval": "Held-out prompts.",
    "time": "Where the seconds went.",
    "memory": "Peaks.",
}

METRICS = (
    Metric("reward/mean", "reward", "mean over scorable completions, before shaping"),
    Metric("reward/std", "reward", "population standard deviation over scorable completions"),
    Metric("reward/correct_frac", "share", "scorable completions that are right"),
    Metric("reward/unscorable_frac", "share", "completions without a verdict (grader or engine failed)"),
    Metric("reward/truncated_mean", "reward", "mean over scorable completions that reached the length cap"),
    Metric("reward/finished_mean", "reward", "mean over scorable completions that ended by themselves"),
    Metric("reward/beyond_correct_frac", "share", "variance of rewards within groups that correctness does not explain"),
    Metric("reward/part/{part}_mean", "reward", "mean of a part over the scorable completions that have it"),
    Metric("reward/part/{part}_share", "share", "variance of rewards within groups that comes from a part; all parts sum to 1"),
    Metric("group/count", "groups", "groups with at least one scorable completion"),
    Metric("group/live_frac", "share", "groups with right and wrong completions"),
    Metric("group/all_right_frac", "share", "groups in which every scorable completion is right"),
    Metric("group/all_wrong_frac", "share", "groups in which every scorable completion is wrong"),
    Metric("group/zero_advantage_frac", "share", "groups in which every trained token has advantage 0"),
    Metric("group/size_min", "completions", "smallest number of scorable completions in a group"),
    Metric("group/size_max", "completions", "largest number of scorable completions in a group"),
    Metric("length/mean", "tokens", "mean over completions"),
    Metric("length/max", "tokens", "longest completion"),
    Metric("length/right_mean", "tokens", "mean over right completions"),
    Metric("length/wrong_mean", "tokens", "mean over scorable wrong completions"),
    Metric("length/truncated_frac", "share", "completions that reached the cap without an end token"),
    Metric("advantage/mean", "reward", "mean"),
    Metric("advantage/std", "reward", "population standard deviation"),
    Metric("advantage/abs_max", "reward", "largest magnitude"),
    Metric("advantage/positive_frac", "share", "tokens with advantage > 0"),
    Metric("policy/entropy_nats", "nats/token", "mean entropy of the distribution that each token was drawn from"),
    Metric("policy/logp_mean_nats", "nats/token", "mean log-probability of the sampled tokens"),
    Metric("policy/clip_frac", "share", "tokens at which the surrogate's clip, cap or gate binds"),
    Metric("policy/log_ratio_mean_nats", "nats/token", "mean of logp − logp_old (staleness)"),
    Metric("policy/log_ratio_max_abs", "nats", "largest |logp − logp_old|"),
    Metric("policy/off_policy_frac", "share", "tokens with |logp − logp_old| > 1e-6; 0 is on-policy"),
    Metric("policy/old_kl_nats", "nats/token", "k3 estimate of KL(π_old‖π) from the tokens of π_old"),
    Metric("gap/mean_nats", "nats/token", "mean gap; away from 0 it is a bias (temperature, truncation, sync)"),
    Metric("gap/max_abs_nats", "nats", "largest |gap|"),
    Metric("gap/k3_nats", "nats/token", "k3 estimate of KL(μ‖π_old) from the engine's tokens"),
    Metric("gap/weight_mean", "ratio", "mean of exp(gap); 1 unless the engine never draws from some of the trainer's mass"),
    Metric("gap/chi2", "1", "mean of (exp(gap) − 1)²: χ²(π_old‖μ), the variance that weighing by exp(gap) costs"),
    Metric("gap/outside_frac", "share", "tokens with exp(gap) outside [.9, 1.1]"),
    Metric("gap/positive_frac", "share", "of the tokens with a gap, those where the trainer gives more; symmetric noise is at .5"),
    Metric("gap/pearson", "1", "correlation of the trainer's with the engine's probability of each token"),
    Metric("gap/ess_frac", "share", "effective share of tokens when each weighs exp(gap)"),
    Metric("gap/sequence_ess_frac", "share", "effective share of completions when each weighs Π exp(gap)"),
    Metric("gap/sequence_max_abs_nats", "nats", "largest |Σ gap| of a completion"),
    Metric("gap/rejected_frac", "share", "tokens that the corrections give weight 0; counts those that leave the denominators"),
    Metric("gap/rejected_completions_frac", "share", "completions all of whose tokens the corrections reject"),
    Metric("gap/correction_mean", "ratio", "mean weight that the corrections give to tokens with an advantage"),
    Metric("kl/ref_k1_nats", "nats/token", "mean of logp − logp_ref"),
    Metric("kl/ref_k3_nats", "nats/token", "mean of exp(−d) − 1 + d with d = logp − logp_ref"),
    Metric("kl/ref_max_abs_nats", "nats", "largest |logp − logp_ref|"),
    Metric("train/loss", "reward", "loss of the step; its value says little, its gradient everything"),
    Metric("train/grad_norm", "norm", "norm of the gradient before clipping"),
    Metric("train/grad_clipped_frac", "share", "optimizer steps whose gradient was clipped"),
    Metric("train/lr", "1", "learning rate"),
    Metric("train/skipped_steps", "steps", "optimizer steps skipped so far because a gradient was not finite"),
    Metric("train/updates", "steps", "optimizer steps taken so far"),
    Metric("train/changed_frac", "share", "parameters whose stored bits changed in the step"),
    Metric("train/staleness_mean", "versions", "mean age of the weights that sampled the trained tokens"),
    Metric("train/staleness_max", "versions", "greatest age of the weights that sampled a trained token"),
    Metric("train/epoch", "epochs", "passes over the training prompts so far"),
    Metric("tokens/step", "tokens", "trained tokens of the step"),
    Metric("tokens/batch", "tokens", "completion tokens generated for the batch, dropped groups included"),
    Metric("tokens/total", "tokens", "completion tokens generated so far"),
    Metric("tokens/per_s", "tokens/s", "completion tokens generated, over the seconds of the step"),
    Metric("sampling/groups_dropped", "groups", "groups generated and not trained on"),
    Metric("sampling/rounds", "rounds", "rounds of generation to fill the batch"),
    Metric("sampling/workers_lost", "workers", "rollout workers that died and were replaced, since this process began"),
    Metric("sampling/engine_errors", "completions", "completions that the engine failed to make"),
    Metric("judge/judged", "completions", "completions that it was asked about"),
    Metric("judge/unscorable", "completions", "those of them without a verdict"),
    Metric("judge/requests", "requests", "sent to the server, retries included"),
    Metric("judge/retries", "requests", "of them, second tries and later ones"),
    Metric("judge/cache_hits", "questions", "answered from the cache, or by the same question in the air"),
    Metric("judge/prompt_tokens", "tokens", "read by the server, as it counts them"),
    Metric("judge/completion_tokens", "tokens", "written by the server, as it counts them"),
    Metric("judge/cost", "currency", "of those tokens, by the prices of the settings"),
    Metric("judge/answers_s", "s", "sum over answered requests, many of which go on at a time"),
    Metric("sync/checksum_ok", "0 or 1", "1 when the engine holds the trainer's very weights"),
    Metric("sync/version", "steps", "version of the weights that the engine holds"),
    Metric("moe/layers_differ_frac", "share", "(token, layer) at which engine and trainer choose other experts"),
    Metric("moe/tokens_differ_frac", "share", "tokens at which they do so in any layer"),
    Metric("moe/layers_moved_frac", "share", "(token, layer) at which the trainer now chooses other experts than when sampling"),
    Metric("moe/tokens_moved_frac", "share", "tokens at which it does so in any layer"),
    Metric("moe/replayed_frac", "share", "tokens that were sent to recorded experts"),
    Metric("moe/load_max", "ratio", "load of the busiest expert of a layer over the mean load, averaged over layers; 1 is even"),
    Metric("moe/idle_frac", "share", "experts to which no token would go"),
    Metric("eval/pass@{k}", "share", "unbiased chance that one of k samples is right"),
    Metric("eval/avg@{k}", "share", "mean share of right answers among k samples"),
    Metric("eval/pass@1_low", "share", "lower end of the 95 % interval of pass@1"),
    Metric("eval/pass@1_high", "share", "upper end of the 95 % interval of pass@1"),
    Metric("eval/reward_mean", "reward", "mean over scorable evaluation completions"),
    Metric("eval/length_mean", "tokens", "mean length of evaluation completions"),
    Metric("eval/truncated_frac", "share", "evaluation completions that reached the cap"),
    Metric("eval/unscorable_frac", "share", "evaluation completions without a verdict"),
    Metric("eval/sampler/pass@{k}", "share", "what the engine's own policy scores, where it is not the trainer's"),
    Metric("eval/sampler/avg@{k}", "share", "the same of the engine's own policy"),
    Metric("eval/sampler/pass@1_low", "share", "the same of the engine's own policy"),
    Metric("eval/sampler/pass@1_high", "share", "the same of the engine's own policy"),
    Metric("eval/sampler/reward_mean", "reward", "the same of the engine's own policy"),
    Metric("eval/sampler/length_mean", "tokens", "the same of the engine's own policy"),
    Metric("eval/sampler/truncated_frac", "share", "the same of the engine's own policy"),
    Metric("eval/sampler/unscorable_frac", "share", "the same of the engine's own policy"),
    Metric("eval/{panel}/pass@{k}", "share", "the same on another set of prompts"),
    Metric("eval/{panel}/avg@{k}", "share", "the same on another set of prompts"),
    Metric("eval/{panel}/pass@1_low", "share", "the same on another set of prompts"),
    Metric("eval/{panel}/pass@1_high", "share", "the same on another set of prompts"),
    Metric("eval/{panel}/reward_mean", "reward", "the same on another set of prompts"),
    Metric("eval/{panel}/length_mean", "tokens", "the same on another set of prompts"),
    Metric("eval/{panel}/truncated_frac", "share", "the same on another set of prompts"),
    Metric("eval/{panel}/unscorable_frac", "share", "the same on another set of prompts"),
    Metric("time/rollout_s", "s", "generation"),
    Metric("time/sample_s", "s", "that workers on a cluster spent on the batch, grading included, added up"),
    Metric("time/reward_s", "s", "grading"),
    Metric("time/logp_s", "s", "forward passes before the first update (logp_old, logp_ref)"),
    Metric("time/train_s", "s", "forward and backward passes and optimizer steps"),
    Metric("time/sync_s", "s", "loading weights into the engine"),
    Metric("time/eval_s", "s", "evaluation"),
    Metric("time/save_s", "s", "checkpoints"),
    Metric("time/step_s", "s", "the whole step"),
    Metric("time/total_s", "s", "since the run began, without interruptions"),
    Metric("memory/peak_mb", "MB", "peak resident memory of the process"),
    Metric("memory/device_peak_mb", "MB", "peak memory of the accelerator"),
)


def metric(name: str) -> Metric:
    """The entry that a concrete name belongs to.

    Raises:
        KeelError: no such metric; the nearest name is given.
    """
    found = next((entry for entry in METRICS if entry.matches(name)), None)
    if found is None:
        known = [entry.name for entry in METRICS]
        raise KeelError(
            f"No metric is named {name!r}; {nearest(name, known)}Expected a name from docs/metrics.md. A new metric "
            "gets its line in keel/diagnostics/metrics.py, with unit and meaning, before it is written."
        )
    return found


def check_names(names: Iterable[str]) -> None:
    """Refuse any name that is not a metric's."""
    for name in names:
        metric(name)


def metrics_markdown() -> str:
    """docs/metrics.md: every metric, by family."""
    head = (
        "# Metrics\n\n"
        "Generated from `src/keel/diagnostics/metrics.py`; do not edit. One line of `metrics.jsonl` is one step.\n"
        "A metric for which there was nothing to measure (the length of right completions when none is right) is\n"
        "absent from that line.\n"
    )
    return "\n".join([head, *(_section(family) for family in FAMILIES)])


def _section(family: str) -> str:
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS if m.family == family]
    head = [f"## {family}", "", FAMILIES[family], "", "| metric | unit | meaning |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, ""])
