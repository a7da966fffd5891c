"""Recipes: published algorithms as choices, each with its paper. A recipe is data; two recipes differ by the fields in
which they differ.

Whatever is not named is as in `solid`: on-policy, leave-one-out, constant length, no clip, no KL, no tricks. Every
choice that differs from `solid` has its source. `keel papers dapo grpo` prints the differences of two of them.

A recipe of your own, in any module:

    from dataclasses import replace
    from keel.objectives.recipes import recipe, register

    register(replace(recipe("dapo"), name="mine", title="DAPO without filtering", dynamic_sampling=False))
"""

from __future__ import annotations

from dataclasses import replace

from keel.objectives.advantages import (
    Advantage,
    CentredBatchStd,
    RawBatchStd,
    TokenWhitening,
    centred,
    group_mean,
    group_normalised,
    leave_one_out,
    zero,
)
from keel.objectives.aggregate import constant_length_mean, sequence_mean, token_mean
from keel.objectives.corrections import MaskToken, OffPolicyMask, TruncateToken
from keel.objectives.kl import LossKL, RewardKL, k1, k2, k3
from keel.objectives.log_ratios import geometric_mean, token
from keel.objectives.objective import Objective
from keel.objectives.registry import RECIPES, Recipe, recipe, register
from keel.objectives.shaping import SoftOverlong
from keel.objectives.surrogates import Cispo, Clip, Gmpo, MiniRL, Reinforce, Sapo
from keel.types import Claim

__all__ = ["RECIPES", "Recipe", "recipe", "register"]

_std_alone = Claim("unbiased", "J_group_std", {"max_tokens": 1}, because="one token, on-policy: only the group's std is left")
_length_bias = Claim("biased", "J", {"max_tokens": 2}, because="tokens weigh by their completion's length, prompts by their std")
_two_scales = Claim("mixture", "J + reverse_kl", {"max_tokens": 1, "prompts": 1, "vocabulary": 5}, because="a scale each")
_stale_bias = Claim("biased", "J", {"drift": 0.4}, because="the weight is the token's, and the clip binds")

solid = Recipe(
    name="solid",
    title="The solid baseline: on-policy, leave-one-out, constant length, no clip, no KL, no tricks",
    objective=Objective(
        advantage=leave_one_out,
        log_ratio=token,
        surrogate=Reinforce(),
        corrections=(),
        reward_kl=None,
        loss_kl=None,
        aggregate=constant_length_mean,
        shaping=(),
        entropy_coef=0.0,
    ),
    dynamic_sampling=False,
    updates_per_batch=1,
    paper="After RLOO (Ahmadian et al. 2024) and Dr. GRPO (Liu et al. 2025)",
    url="https://arxiv.org/abs/2402.14740",
    sources={
        "advantage.baseline": "RLOO, its estimator: unbiased",
        "advantage.scale": "Dr. GRPO, §3.2: no std, so no prompt is reweighted",
        "surrogate": "one update a batch: the ratio is 1 and a clip would be idle",
        "aggregate": "Dr. GRPO, §3.2: no length bias",
    },
    notes="Unbiased for the expected reward, up to the constant 1/max_tokens. Everything else is measured against it.",
    claims=(
        Claim("unbiased", "J"),
        Claim("zero", conditions={"reward": "coin"}, because="a random reward teaches nothing"),
        Claim("biased", "J", {"gap": 0.4}, because="nothing is done about a gap between engine and trainer"),
    ),
)

grpo = Recipe(
    name="grpo",
    title="GRPO: group-normalised rewards, per-completion mean, clip, k3 in the loss",
    objective=Objective(
        advantage=group_normalised,
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        loss_kl=LossKL(kl_coef=0.04, estimator=k3),
        aggregate=sequence_mean,
    ),
    paper="DeepSeekMath (Shao et al. 2024)",
    url="https://arxiv.org/abs/2402.03300",
    sources={
        "advantage.baseline": "§4.1.2: group mean",
        "advantage.scale": "§4.1.2: group std; ddof 1 and eps 1e-4 as in TRL, the paper names neither",
        "surrogate": "eq. 3; ε .2 as in PPO, the paper names none",
        "loss_kl": "eq. 3–4 and §4.2: k3 per token in the loss, β .04",
        "aggregate": "eq. 3: 1/G Σ 1/|o| Σ",
    },
    notes="One update per batch, as in §4.2: the clip is then idle.",
    claims=(
        Claim(
            "unbiased", "J_group_std - 0.04 forward_kl", {"max_tokens": 1}, because="one token: the std is left, and k3 is forward"
        ),
        _length_bias,
    ),
)

dapo = Recipe(
    name="dapo",
    title="DAPO: clip-higher, dynamic sampling, token mean, soft overlong punishment, no KL",
    objective=Objective(
        advantage=group_normalised,
        surrogate=Clip(clip_low=0.2, clip_high=0.28),
        aggregate=token_mean,
        shaping=(SoftOverlong(buffer_share=0.2, scale=0.5),),
    ),
    dynamic_sampling=True,
    updates_per_batch=16,
    paper="DAPO (Yu et al. 2025)",
    url="https://arxiv.org/abs/2503.14476",
    sources={
        "advantage.baseline": "eq. 9: group mean",
        "advantage.scale": "eq. 9: group std; ddof 1 as in its code (verl), eps as in grpo",
        "surrogate": "§3.1 and §4.1: clip-higher, ε_low .2, ε_high .28",
        "aggregate": "its code: the tokens of the whole batch; the formula (eq. 8) divides by one group's: group_token_mean",
        "shaping": "eq. 13: cache 4,096 of 20,480; scale .5 because rewards here are 0 and 1, there −1 and 1",
        "dynamic_sampling": "§3.2, eq. 11",
        "updates_per_batch": "§4.1: 16 gradient updates for each rollout step",
    },
    notes="The overlong filter of §3.4 (`OverlongFilter`) is the alternative to the punishment, and is not in its released script.",
    claims=(Claim("scaled", "J_group_std", {"max_tokens": 1}, because="one token: the std is left"), _length_bias),
)

dr_grpo = Recipe(
    name="dr_grpo",
    title="Dr. GRPO: GRPO done right, without std and without the length in the divisor",
    objective=Objective(advantage=centred, surrogate=Clip(clip_low=0.2, clip_high=0.2), aggregate=constant_length_mean),
    paper="Understanding R1-Zero-like training (Liu et al. 2025)",
    url="https://arxiv.org/abs/2503.20783",
    sources={
        "advantage.baseline": "§3.2: group mean",
        "surrogate": "its objective keeps PPO's clip, ε .2 in its code",
    },
    claims=(Claim("scaled", "J", factor="(G-1)/G", because="a completion is 1/G of its own baseline"), _stale_bias),
)

rloo = Recipe(
    name="rloo",
    title="RLOO: leave-one-out REINFORCE, KL in the reward",
    objective=Objective(advantage=leave_one_out, reward_kl=RewardKL(kl_coef=0.05, estimator=k1)),
    paper="Back to basics (Ahmadian et al. 2024)",
    url="https://arxiv.org/abs/2402.14740",
    sources={"reward_kl": "β log(π/π_ref) of the whole completion taken off the reward; β .05 as in TRL"},
    notes="The paper sums log-probabilities over the completion; constant_length_mean is that sum up to the constant 1/max_tokens.",
    claims=(Claim("unbiased", "J - 0.05 reverse_kl"),),
)

reinforce_pp = Recipe(
    name="reinforce_pp",
    title="REINFORCE++: k1 in token rewards, returns whitened over the batch, clip",
    objective=Objective(
        advantage=Advantage(zero, TokenWhitening()),
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        reward_kl=RewardKL(kl_coef=0.01, estimator=k1, to_go=True),
        aggregate=token_mean,
    ),
    paper="REINFORCE++ (Hu et al. 2025)",
    url="https://arxiv.org/abs/2501.03262",
    sources={
        "advantage.baseline": "none: global normalisation takes its place",
        "advantage.scale": "global advantage normalisation, over the tokens of the batch",
        "surrogate": "its objective keeps PPO's clip; ε .2 as in OpenRLHF",
        "reward_kl": "token-level KL penalty, undiscounted returns; β .01 as in OpenRLHF",
        "aggregate": "token mean, as in OpenRLHF",
    },
    claims=(
        Claim("scaled", "J", {"max_tokens": 1, "prompts": 1, "ref": 0.0}, because="one prompt, one token, no KL: a scale only"),
        Claim("biased", "J - 0.01 reverse_kl", because="whitening weighs by tokens, and reweights prompts"),
    ),
)

reinforce_pp_baseline = Recipe(
    name="reinforce_pp_baseline",
    title="REINFORCE++-baseline: group mean first, then whitened over the tokens of the batch",
    objective=Objective(
        advantage=Advantage(group_mean, TokenWhitening()),
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        loss_kl=LossKL(kl_coef=0.001, estimator=k2),
        aggregate=token_mean,
    ),
    paper="REINFORCE++ (Hu et al. 2025)",
    url="https://arxiv.org/abs/2501.03262",
    sources={
        "advantage.baseline": "its variant with baseline: group mean",
        "advantage.scale": "the same global normalisation after it",
        "surrogate": "its objective keeps PPO's clip; ε .2 as in OpenRLHF",
        "loss_kl": "k2 as a separate loss; the coefficient .001 is ours",
        "aggregate": "token mean, as in OpenRLHF",
    },
    notes="The token-weighted mean of centred rewards is not zero: a group that is wrong throughout can get a positive advantage.",
    claims=(_two_scales, _length_bias),
)

reinforce_pp_centred = replace(
    reinforce_pp_baseline,
    name="reinforce_pp_centred",
    title="REINFORCE++-baseline without its trap: divided by the batch's std, not shifted",
    objective=replace(reinforce_pp_baseline.objective, advantage=Advantage(group_mean, CentredBatchStd())),
    sources={
        **reinforce_pp_baseline.sources,
        "advantage.scale": "ours: std over completions of the centred rewards; a group without signal stays at zero",
    },
    notes="Ours, for comparison with reinforce_pp_baseline.",
)

lite_ppo = Recipe(
    name="lite_ppo",
    title="Lite PPO: group mean, batch std, token mean, plain clip",
    objective=Objective(
        advantage=Advantage(group_mean, RawBatchStd()),
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        aggregate=token_mean,
    ),
    paper="Tricks or traps, part I (Liu et al. 2025)",
    url="https://arxiv.org/abs/2508.08221",
    sources={
        "advantage.baseline": "its combination: group mean",
        "advantage.scale": "its combination: std of the raw rewards of the whole batch; ddof and eps are ours",
        "surrogate": "vanilla PPO loss; ε .2",
        "aggregate": "its combination: token-level loss",
    },
    claims=(Claim("scaled", "J", {"max_tokens": 1, "prompts": 1}, because="one prompt, one token: a scale only"), _length_bias),
)

minirl = Recipe(
    name="minirl",
    title="MiniRL: importance weight π/μ and a clip mask on π/π_old, nothing else",
    objective=Objective(advantage=centred, surrogate=MiniRL(clip_low=0.2, clip_high=0.27, cap=5.0)),
    paper="Stabilizing RL with LLMs (Zheng et al. 2025)",
    url="https://arxiv.org/abs/2512.01374",
    sources={
        "advantage.baseline": "its MiniRL objective: reward minus group mean",
        "surrogate": "its MiniRL objective; ε .2 and .27, weights truncated at 5",
    },
    notes="For mixtures of experts the paper adds routing replay. It takes 1, 2, 4 or 8 updates a batch; here 1.",
    claims=(
        Claim("scaled", "J", factor="(G-1)/G", because="a completion is 1/G of its own baseline"),
        Claim("scaled", "J", {"gap": 0.2, "max_tokens": 1, "prompts": 1}, because="one token: π_old/μ is the whole weight"),
        _stale_bias,
    ),
)

gspo = Recipe(
    name="gspo",
    title="GSPO: one importance ratio per completion, the geometric mean of its tokens'",
    objective=Objective(
        advantage=group_normalised,
        log_ratio=geometric_mean,
        surrogate=Clip(clip_low=3e-4, clip_high=4e-4),
        aggregate=sequence_mean,
    ),
    updates_per_batch=4,
    paper="Group sequence policy optimization (Zheng et al. 2025)",
    url="https://arxiv.org/abs/2507.18071",
    sources={
        "advantage.baseline": "eq. 6: group mean",
        "advantage.scale": "eq. 6: group std; ddof and eps as in grpo",
        "log_ratio": "eq. 7",
        "surrogate": "eq. 5 and §5.1: clip 3e-4 and 4e-4",
        "aggregate": "eq. 5: 1/G Σ over completions",
        "updates_per_batch": "§5.1: four minibatches",
    },
    claims=(_std_alone, _length_bias),
)

gmpo = Recipe(
    name="gmpo",
    title="GMPO: geometric mean of token-clipped ratios",
    objective=Objective(advantage=group_normalised, surrogate=Gmpo(log_clip=0.4), aggregate=sequence_mean),
    paper="Geometric-mean policy optimization (Zhao et al. 2025)",
    url="https://arxiv.org/abs/2507.20673",
    sources={
        "advantage.baseline": "as in GRPO: group mean",
        "advantage.scale": "as in GRPO: group std",
        "surrogate": "its objective; clip (e^−.4, e^.4)",
        "aggregate": "its objective: 1/G Σ over completions",
    },
    claims=(_std_alone, _length_bias),
)

cispo = Recipe(
    name="cispo",
    title="CISPO: bounded importance weight, no token loses its gradient",
    objective=Objective(advantage=group_normalised, surrogate=Cispo(cap=5.0), aggregate=token_mean),
    updates_per_batch=16,
    paper="MiniMax-M1 (2025)",
    url="https://arxiv.org/abs/2506.13585",
    sources={
        "advantage.baseline": "as in GRPO: group mean",
        "advantage.scale": "as in GRPO: group std",
        "surrogate": "eq. 4–5; the cap is an absolute 5 as in ScaleRL, the paper does not publish its own",
        "aggregate": "eq. 4: one token mean; over the batch here",
        "updates_per_batch": "§3.1: 16 rounds of off-policy updates",
    },
    claims=(_std_alone, _length_bias),
)

sapo = Recipe(
    name="sapo",
    title="SAPO: a soft gate in place of the clip",
    objective=Objective(advantage=group_normalised, surrogate=Sapo(tau_positive=1.0, tau_negative=1.05), aggregate=sequence_mean),
    updates_per_batch=4,
    paper="Soft adaptive policy optimization (Gao et al. 2025)",
    url="https://arxiv.org/abs/2511.20347",
    sources={
        "advantage.baseline": "as in GRPO: group mean",
        "advantage.scale": "as in GRPO: group std",
        "surrogate": "its soft gate; τ 1.0 and 1.05",
        "aggregate": "1/G Σ 1/|o| Σ",
        "updates_per_batch": "its comparison with GSPO: four minibatches",
    },
    claims=(_std_alone, _length_bias),
)

tis = Recipe(
    name="tis",
    title="TIS: token weight min(π_old/μ, 2) on a clipped token-mean objective",
    objective=Objective(
        advantage=group_normalised,
        surrogate=Clip(clip_low=0.2, clip_high=0.28),
        corrections=(TruncateToken(cap=2.0),),
        aggregate=token_mean,
    ),
    paper="Your efficient RL framework secretly brings you off-policy RL training (Yao et al. 2025)",
    url="https://fengyao.notion.site/off-policy-rl",
    sources={
        "advantage.baseline": "its experiments run DAPO's objective",
        "advantage.scale": "its experiments run DAPO's objective",
        "surrogate": "its experiments run DAPO's objective",
        "corrections": "min(w, C), C = 2",
        "aggregate": "its experiments run DAPO's objective",
    },
    notes="DAPO's dynamic sampling, punishment and 16 updates are left out, so that the correction stands alone.",
    claims=(_std_alone, _length_bias),
)

icepop = Recipe(
    name="icepop",
    title="IcePop: tokens whose engine gap leaves [.5, 5] give no gradient",
    objective=Objective(
        advantage=group_normalised,
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        corrections=(MaskToken(low=0.5, high=5.0),),
        aggregate=sequence_mean,
    ),
    paper="Every step evolves (Ling team 2025)",
    url="https://arxiv.org/abs/2510.18855",
    sources={
        "advantage.baseline": "as in GRPO: group mean",
        "advantage.scale": "as in GRPO: group std",
        "surrogate": "as in GRPO; ε .2",
        "corrections": "its masking function with α .5 and β 5; a masked token stays in the denominator",
        "aggregate": "as in GRPO: 1/G Σ 1/|o| Σ",
    },
    claims=(_std_alone, _length_bias),
)

deepseek_v32 = Recipe(
    name="deepseek_v32",
    title="DeepSeek-V3.2: centred, ρ·k3 in the loss, bad off-policy completions masked",
    objective=Objective(
        advantage=centred,
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        corrections=(OffPolicyMask(delta=0.1, against_sampler=True),),
        loss_kl=LossKL(kl_coef=0.001, estimator=k3, ratio=token),
        aggregate=sequence_mean,
    ),
    updates_per_batch=4,
    paper="DeepSeek-V3.2 (2025)",
    url="https://arxiv.org/abs/2512.02556",
    sources={
        "advantage.baseline": "its objective: reward minus group mean",
        "surrogate": "its objective keeps the clip; ε .2, the report names none",
        "corrections": "eq. 8–9, with the sampler's log-probabilities; δ is ours",
        "loss_kl": "eq. 7: k3 times the importance ratio; it uses a strength per domain, .001 is ours",
        "aggregate": "its objective: 1/G Σ 1/|o| Σ",
        "updates_per_batch": "several updates a batch; four is ours",
    },
    notes="The report also keeps the sampler's expert routing and its sampling mask.",
    claims=(_two_scales, _length_bias),
)

decoupled = Recipe(
    name="decoupled",
    title="Decoupled PPO: behaviour weight outside, proximal policy inside the clip",
    objective=Objective(
        advantage=group_normalised,
        surrogate=Clip(clip_low=0.2, clip_high=0.2),
        corrections=(TruncateToken(cap=float("inf")),),
        aggregate=token_mean,
    ),
    updates_per_batch=4,
    paper="AReaL (Fu et al. 2025)",
    url="https://arxiv.org/abs/2505.24298",
    sources={
        "advantage.baseline": "as in its GRPO runs: group mean",
        "advantage.scale": "as in its GRPO runs: group std",
        "surrogate": "its decoupled objective: the clip is around the proximal policy; ε .2",
        "corrections": "its decoupled objective: π_prox/π_behav; its code masks above a cap: MaskToken(0, 5)",
        "aggregate": "token mean, as in its code",
        "updates_per_batch": "four minibatches, as in its configurations",
    },
    notes="logp_old is the proximal policy: the trainer just before this batch's updates, however old the sampling weights are.",
    claims=(_std_alone, _length_bias),
)


for _recipe in (
    solid, grpo, dapo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, reinforce_pp_centred, lite_ppo, minirl,
    gspo, gmpo, cispo, sapo, tis, icepop, deepseek_v32, decoupled,
):  # fmt: skip
    register(_recipe)
