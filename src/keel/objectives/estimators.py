"""Parts of an objective, each alone, with what it is said to follow: the claims that `keel audit` checks by enumeration.

Each is a recipe whose objective holds that one part on top of the plain policy gradient (`solid`), so that a recipe can be read
as a sum of them. KL terms have coefficient 1 and are looked at in worlds without reward. Everywhere the constant divisor counts
as 1, so "unbiased" is meant literally.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from keel.objectives import advantages, aggregate, corrections, kl, log_ratios, surrogates
from keel.objectives.advantages import Advantage
from keel.objectives.kl import LossKL, RewardKL, per_sequence
from keel.objectives.objective import Objective
from keel.objectives.registry import Recipe
from keel.objectives.shaping import OverlongFilter, SoftOverlong
from keel.types import Claim

SILENT = {"reward": "zero"}
ONE_TOKEN = {"max_tokens": 1}
LONGER = {"max_tokens": 2}
DRIFT, GAP = {"drift": 0.4}, {"gap": 0.4}
BOTH = DRIFT | GAP
ANY_TOKEN_EARNS = {"max_tokens": 2, "reward": "real"}  # the reward depends on every token


def _named(name: str, title: str, objective: Objective, *claims: Claim, dynamic_sampling: bool = False) -> Recipe:
    return Recipe(name, title, objective, dynamic_sampling=dynamic_sampling, claims=claims)


def _of_kl(name: str, title: str, objective: Objective, *claims: Claim) -> Recipe:
    return _named(name, title, objective, *(replace(claim, conditions=SILENT | claim.conditions) for claim in claims))


def _unbiased(truth: str, because: str = "", **conditions) -> Claim:
    return Claim("unbiased", truth, conditions, because=because)


def _biased(truth: str, because: str = "", at_least: float = 1e-2, **conditions) -> Claim:
    return Claim("biased", truth, conditions, tolerance=at_least, because=because)


def _loss_kl(estimator, **more) -> Objective:
    return Objective(loss_kl=LossKL(1.0, estimator, **more))


def _reward_kl(estimator, **more) -> Objective:
    return Objective(reward_kl=RewardKL(1.0, estimator, **more))


KL = (
    _of_kl(
        "k1_in_loss", "k1 per token in the loss", _loss_kl(kl.k1),
        Claim("zero", because="the expected score of a token is zero"),
    ),
    _of_kl(
        "k2_in_loss", "k2 per token in the loss", _loss_kl(kl.k2),
        _unbiased("-reverse_kl", "one token: d times its score", **ONE_TOKEN),
        _unbiased("-reverse_kl_positions", "each token pays for itself alone"),
        _biased("-reverse_kl", "what a token does to the KL of later tokens is dropped", **LONGER),
    ),
    _of_kl(
        "k2_sequence_in_loss", "k2 of the completion in the loss", _loss_kl(kl.k2, level=per_sequence),
        _unbiased("-reverse_kl", "the completion's whole log-ratio times its score"),
    ),
    _of_kl(
        "k2_prefix_in_loss", "k2 of each prefix in the loss", _loss_kl(kl.k2, level=kl.per_prefix),
        _unbiased("-reverse_kl_prefixes", "each prefix's log-ratio times its score"),
    ),
    _of_kl(
        "k3_in_loss", "k3 per token in the loss", _loss_kl(kl.k3),
        _unbiased("-forward_kl", "one token: its gradient is (1 − π_ref/π) times the score", **ONE_TOKEN),
        _unbiased("-forward_kl_positions", "the same at each prefix, and prefixes come from π"),
        _biased("-reverse_kl", "it is a forward KL", **LONGER),
        _biased("-forward_kl", "prefixes come from π, not from π_ref", **LONGER),
    ),
    _of_kl(
        "k3_sequence_in_loss", "k3 of the completion in the loss", _loss_kl(kl.k3, level=per_sequence),
        _unbiased("-forward_kl", "(1 − π_ref/π) of the whole completion times its score"),
    ),
    _of_kl(
        "k3_ratio_in_loss", "token ratio times k3 in the loss", _loss_kl(kl.k3, ratio=log_ratios.token),
        _unbiased("-reverse_kl_positions", "the ratio gives back each token's own score term"),
        _biased("-reverse_kl", "what a token does to the KL of later tokens is dropped", **LONGER),
    ),
    _of_kl(
        "k3_prefix_ratio_in_loss", "prefix ratio times k3 in the loss", _loss_kl(kl.k3, ratio=log_ratios.prefix),
        _unbiased("-reverse_kl", "the value's expectation, differentiated whole"),
        _unbiased("-reverse_kl", "the prefix ratio makes it so off-policy too", **BOTH),
    ),
    _of_kl(
        "k1_in_reward", "k1 of the completion in the reward", _reward_kl(kl.k1),
        _unbiased("-reverse_kl", "the log-ratio is its own reward; its derivative expects zero"),
    ),
    _of_kl(
        "k1_in_reward_to_go", "k1 in the reward, each token for itself and what follows", _reward_kl(kl.k1, to_go=True),
        _unbiased("-reverse_kl", "what came before a token does not depend on it"),
    ),
    _of_kl(
        "k2_in_reward", "k2 per token in the reward", _reward_kl(kl.k2),
        _biased("-reverse_kl", "the estimate is not the KL, and near π_ref its gradient is of second order"),
    ),
    _of_kl(
        "k3_in_reward", "k3 per token in the reward", _reward_kl(kl.k3),
        _unbiased("-reverse_kl + forward_kl_positions", "the score term alone; the other is in the loss's derivative"),
        _biased("-reverse_kl", "near π_ref the two nearly cancel: what is left has another direction", at_least=0.1, ref=0.05),
    ),
    _of_kl(
        "k3_in_reward_and_loss", "k3 per token in reward and loss, full coefficient each",
        Objective(reward_kl=RewardKL(1.0, kl.k3), loss_kl=LossKL(1.0, kl.k3)),
        _unbiased("-reverse_kl", "score term and derivative together"),
    ),
    _of_kl(
        "k3_clamped_in_loss", "k3 clamped to ±10 per token in the loss", _loss_kl(kl.k3_clamped),
        _unbiased("-forward_kl_positions", "near π_ref the clamp is idle", ref=0.1),
        _biased("-forward_kl_positions", "no gradient where π has dropped what π_ref keeps", ref=4.0),
    ),
    _of_kl(
        "k1_in_loss_sequence_mean", "k1 in the loss under a mean per completion",
        Objective(loss_kl=LossKL(1.0, kl.k1), aggregate=aggregate.sequence_mean),
        _biased("0", "dividing by the length makes the score's expectation non-zero", **LONGER),
    ),
    _of_kl(
        "k3_in_loss_sequence_mean", "k3 in the loss under a mean per completion",
        Objective(loss_kl=LossKL(1.0, kl.k3), aggregate=aggregate.sequence_mean),
        _biased("-forward_kl_positions", "the divisor depends on the tokens that follow", **LONGER),
    ),
    _of_kl(
        "k1_in_reward_sequence_mean", "k1 in the reward under a mean per completion",
        Objective(reward_kl=RewardKL(1.0, kl.k1), aggregate=aggregate.sequence_mean),
        _biased("-reverse_kl", "the divisor depends on the tokens that follow", **LONGER),
    ),
    _of_kl(
        "entropy_bonus", "the entropy of each token's distribution as a bonus", Objective(entropy_coef=1.0),
        _unbiased("entropy_positions", "no term for which prefixes are reached"),
        _biased("entropy", "entropy of what follows is not seen", **LONGER),
    ),
)  # fmt: skip

BASELINES = (
    _named(
        "leave_one_out", "reward minus the mean of the other completions", Objective(advantage=advantages.leave_one_out),
        _unbiased("J", "the baseline does not depend on the completion"), _unbiased("J", reward="real"),
    ),
    _named(
        "group_mean", "reward minus the group's mean", Objective(advantage=advantages.centred),
        Claim("scaled", "J", factor="(G-1)/G", because="a completion is 1/G of its own baseline"),
        Claim("scaled", "J", {"reward": "real"}, factor="(G-1)/G"),
    ),
    _named(
        "no_baseline", "the reward as it is", Objective(advantage=advantages.none),
        _unbiased("J", "of the largest variance"), _unbiased("J", reward="real"),
    ),
    _named(
        "batch_mean", "reward minus the batch's mean",
        Objective(advantage=Advantage(advantages.batch_mean, advantages.unscaled)),
        Claim("scaled", "J", factor="(B-1)/B", because="a completion is 1/B of its own baseline"),
    ),
    _named(
        "group_std", "centred, divided by the group's std", Objective(advantage=advantages.group_normalised),
        _unbiased("J_group_std", "each prompt's gradient times c_G(p)"),
        Claim("scaled", "J", {"prompts": 1}, because="with one prompt a scale only"),
        _biased("J", "prompts are reweighted by c_G(p)", prompts=2, group_size=4, **ONE_TOKEN),
    ),
    _named(
        "raw_batch_std", "centred, divided by the std of the batch's rewards",
        Objective(advantage=Advantage(advantages.group_mean, advantages.RawBatchStd())),
        Claim("scaled", "J", {"prompts": 1}, because="with one prompt a scale only"),
        _biased("J", "the std is of the same batch: prompts are reweighted a little", 1e-3, prompts=2, **ONE_TOKEN),
    ),
    _named(
        "centred_batch_std", "centred, divided by the std of the centred rewards",
        Objective(advantage=Advantage(advantages.group_mean, advantages.CentredBatchStd())),
        Claim("scaled", "J", {"prompts": 1}, because="with one prompt a scale only"),
        _biased("J", "the std is of the same batch: prompts are reweighted a little", 1e-3, prompts=2, **ONE_TOKEN),
    ),
    _named(
        "token_whitening", "centred, then whitened over the tokens of the batch",
        Objective(advantage=Advantage(advantages.group_mean, advantages.TokenWhitening())),
        Claim("scaled", "J", {"prompts": 1, **ONE_TOKEN}, because="one prompt, one token: a scale only"),
        _biased("J", "long completions weigh more in mean and std", **LONGER),
    ),
    _named(
        "token_std", "centred, divided by the std over the tokens of the batch",
        Objective(advantage=Advantage(advantages.group_mean, advantages.TokenStd())),
        Claim("scaled", "J", {"prompts": 1, **ONE_TOKEN}, because="one prompt, one token: a scale only"),
        _biased("J", "long completions weigh more in the std", **LONGER),
    ),
    _named(
        "dynamic_sampling", "groups without both right and wrong answers are drawn again", Objective(),
        Claim("scaled", "J", {"live_only": True}, because="dead groups had no gradient: fewer batches, the same direction"),
    ),
)  # fmt: skip

AGGREGATES = (
    _named(
        "constant_length_mean", "token losses summed over a constant", Objective(),
        _unbiased("J", "every token weighs the same"),
    ),
    *(
        _named(
            name, title, Objective(aggregate=getattr(aggregate, name)),
            _unbiased("J", "all completions are as long", **ONE_TOKEN), _biased("J", because, **LONGER),
        )
        for name, title, because in (
            ("sequence_mean", "mean per completion", "a token of a long completion weighs less"),
            ("prompt_mean", "mean per prompt of the mean per completion", "a token of a long completion weighs less"),
            ("group_token_mean", "mean over a group's tokens", "the divisor depends on the completion: about 1/G"),
            ("token_mean", "mean over the batch's tokens", "the divisor depends on the completion: about 1/B"),
        )
    ),
    _named(
        "balanced_mean", "token means of right and wrong apart", Objective(aggregate=aggregate.balanced_mean),
        _biased("J", "each side is divided by its own tokens", **LONGER),
    ),
)  # fmt: skip

_IDLE_ON_POLICY = "with the ratio at 1 nothing binds"

SURROGATES = (
    _named(
        "reinforce", "no ratio", Objective(),
        _unbiased("J"), _biased("J", "samples are from an older policy", **DRIFT),
    ),
    _named(
        "token_ratio", "importance ratio of the token", Objective(surrogate=surrogates.Unclipped()),
        _unbiased("J", "r = 1"), _unbiased("J", "one token: its ratio is the whole one", **ONE_TOKEN, **DRIFT),
        _biased("J", "right to first order only: what comes before and after keeps the old law", **ANY_TOKEN_EARNS, **DRIFT),
        Claim("zero", conditions={"reward": "coin", **DRIFT}, because="a random reward teaches nothing"),
    ),
    _named(
        "sequence_ratio", "importance ratio of the completion",
        Objective(surrogate=surrogates.Unclipped(), log_ratio=log_ratios.sequence),
        _unbiased("J"), _unbiased("J", "exact off-policy, at the price of variance", **DRIFT),
    ),
    _named(
        "prefix_ratio", "importance ratio of the prefix",
        Objective(surrogate=surrogates.Unclipped(), log_ratio=log_ratios.prefix),
        _unbiased("J"), _biased("J", "what follows, and with it the reward, keeps the old law", **ANY_TOKEN_EARNS, **DRIFT),
    ),
    *(
        _named(
            name, title, objective, _unbiased("J", _IDLE_ON_POLICY), _biased("J", because, **DRIFT),
            Claim("zero", conditions={"reward": "coin"}, because="a random reward teaches nothing on-policy"),
            _biased("0", "a clip does not treat +1 and −1 alike: a random reward moves the policy", 1e-3, **DRIFT, reward="coin"),
        )
        for name, title, objective, because in (
            ("clip", "clip at .2/.2", Objective(surrogate=surrogates.Clip()), "clipped tokens give nothing"),
            ("clip_higher", "clip at .2/.28", Objective(surrogate=surrogates.Clip(0.2, 0.28)), "clipped tokens give nothing"),
            ("dual_clip", "clip with a floor for A < 0", Objective(surrogate=surrogates.DualClip()), "clipped tokens give nothing"),
            (
                "geometric_ratio", "clip on the geometric mean of ratios",
                Objective(surrogate=surrogates.Clip(3e-4, 4e-4), log_ratio=log_ratios.geometric_mean),
                "the ratio is not the completion's",
            ),
            ("gmpo", "token-clipped geometric mean", Objective(surrogate=surrogates.Gmpo()), "the ratio is not the completion's"),
            ("sapo", "soft gate", Objective(surrogate=surrogates.Sapo()), "the gate shrinks what is far from 1"),
        )
    ),
    _named(
        "cispo", "capped weight, every token keeps its gradient", Objective(surrogate=surrogates.Cispo()),
        _unbiased("J", _IDLE_ON_POLICY), _biased("J", "weights are per token", **ANY_TOKEN_EARNS, **DRIFT),
        Claim("zero", conditions={"reward": "coin", **DRIFT}, because="its weight does not look at the reward's sign"),
    ),
    _named(
        "minirl", "weight π/μ under a clip mask on π/π_old", Objective(surrogate=surrogates.MiniRL()),
        _unbiased("J", _IDLE_ON_POLICY),
        _unbiased("J", "one token: π_old/μ is the whole weight, under its cap", **ONE_TOKEN, gap=0.2),
        _biased("J", "masked tokens give nothing", **LONGER, **DRIFT),
    ),
)  # fmt: skip

CORRECTIONS = (
    _named("no_correction", "the engine gap left alone", Objective(), _biased("J", "samples are from the engine's law", **GAP)),
    _named(
        "token_weight", "π_old/μ of the token", Objective(corrections=(corrections.TruncateToken(cap=inf),)),
        _unbiased("J", "one token: its weight is the whole one", **ONE_TOKEN, **GAP),
        _biased("J", "what comes before and after keeps the engine's law", **ANY_TOKEN_EARNS, **GAP),
    ),
    _named(
        "sequence_weight", "π_old/μ of the completion", Objective(corrections=(corrections.TruncateSequence(cap=inf),)),
        _unbiased("J", "exact, at the price of variance", **GAP),
    ),
    _named(
        "both_weights", "π/μ of the completion, staleness and gap",
        Objective(
            surrogate=surrogates.Unclipped(), log_ratio=log_ratios.sequence,
            corrections=(corrections.TruncateSequence(cap=inf),),
        ),
        _unbiased("J", "exact, at the price of variance", **BOTH),
    ),
    *(
        _named(
            name, title, Objective(corrections=(part,)),
            _unbiased("J", "without a gap it is idle"), _biased("J", because, **GAP),
        )
        for name, title, part, because in (
            ("truncate_token", "token weight capped at 1.2", corrections.TruncateToken(cap=1.2), "the cap binds"),
            ("truncate_sequence", "completion weight capped at 1.2", corrections.TruncateSequence(cap=1.2), "the cap binds"),
            ("mask_token", "token weight, 0 outside [.8, 1.25]", corrections.MaskToken(0.8, 1.25), "masked tokens give nothing"),
            (
                "mask_sequence", "completion weight, 0 above 1.2", corrections.MaskSequence(high=1.2),
                "masked completions give nothing",
            ),
            ("veto", "completions with a token weight under .8 dropped", corrections.Veto(0.8), "what is left is unfair"),
            (
                "reject_geometric", "completions dropped whose mean weight leaves [.8, 1.25]",
                corrections.RejectGeometric(0.8, 1.25),
                "what is left is not a fair sample",
            ),
        )
    ),
)  # fmt: skip

SHAPING = (
    _named(
        "soft_overlong", "a punishment that grows with the length past a limit", Objective(shaping=(SoftOverlong(0.5),)),
        _unbiased("J - length", "here it costs 1 a token after the first", **LONGER),
    ),
    _named(
        "overlong_filter", "truncated completions give no loss", Objective(shaping=(OverlongFilter(),)),
        _biased("J", "whether a completion is truncated depends on what it says", **LONGER),
    ),
    _named(
        "off_policy_mask", "bad completions that left the policy give no loss",
        Objective(corrections=(corrections.OffPolicyMask(),)),
        _unbiased("J", "on-policy it is idle"), _biased("J", "bad ones are dropped, good ones are not", **DRIFT),
    ),
)  # fmt: skip

SAMPLING = (
    _named(
        "top_p", "nucleus sampling, trainer over the full vocabulary", Objective(),
        _biased("J", "the sampler never draws part of the policy", top_p=0.7),
    ),
    _named(
        "top_p_replayed", "nucleus sampling, trainer over the same nucleus", Objective(),
        _unbiased("J", "of the truncated policy", top_p=0.7, replay_mask=True),
    ),
    _named(
        "experts", "a mixture of experts, on-policy", Objective(),
        _unbiased("J", "the router's choice stands; its probability has a gradient", policy="moe"),
    ),
)  # fmt: skip

GRADERS = (
    _named(
        "noisy_grader", "right and wrong answers misjudged by chance, centred", Objective(),
        Claim("scaled", "J", {"tpr": 0.8, "fpr": 0.2}, "TPR-FPR", because="false verdicts cancel on average"),
        Claim("zero", conditions={"tpr": 0.5, "fpr": 0.5}, because="TPR = FPR: the verdict says nothing"),
        Claim("scaled", "J", {"tpr": 0.3, "fpr": 0.6}, "TPR-FPR", because="TPR < FPR: learning is reversed"),
    ),
    _named(
        "noisy_grader_group_std", "the same, divided by the group's std", Objective(advantage=advantages.group_normalised),
        _unbiased("J_group_std", "c_G is taken at the graded pass rate", tpr=0.8, fpr=0.2),
        _biased("J", "the loss of signal depends on the prompt", 1e-3, tpr=0.8, fpr=0.2, prompts=2, group_size=4, **ONE_TOKEN),
    ),
    _named(
        "biased_grader", "wrong answers of full length accepted more often", Objective(),
        _unbiased("J_graded", "it follows the grader", favours_long=0.5),
        _biased("J", "errors that look at the surface change the objective", favours_long=0.5),
    ),
)  # fmt: skip

FAMILIES: dict[str, tuple[Recipe, ...]] = {
    "KL": KL,
    "baseline and scale": BASELINES,
    "aggregation": AGGREGATES,
    "ratio and surrogate": SURROGATES,
    "engine gap": CORRECTIONS,
    "shaping and filters": SHAPING,
    "sampling": SAMPLING,
    "grader": GRADERS,
}

ESTIMATORS: dict[str, Recipe] = {estimator.name: estimator for family in FAMILIES.values() for estimator in family}
