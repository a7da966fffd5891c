"""Expectations by enumeration, in a world of three tokens and at most two of them, float64.

Token 0 ends a completion at once, so that there are 1 + 2·3 = 7 completions of length 1 or 2. Every fact below is about
on-policy updates with token losses summed over a constant divisor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from keel.objectives.advantages import Advantage, CentredBatchStd, GroupStd, RawBatchStd, group_mean, none
from keel.objectives.aggregate import constant_length_mean, sequence_mean
from keel.objectives.kl import LossKL, RewardKL, k1, k2, k3, per_prefix, per_sequence
from keel.objectives.log_ratios import prefix, token
from keel.objectives.objective import Objective
from keel.objectives.recipes import recipe
from keel.objectives.signals import Prepared, Scored
from keel.objectives.surrogates import Clip, Unclipped
from keel.types import Batch

COMPLETIONS = [(0,), *itertools.product((1, 2), (0, 1, 2))]
INSIDE = torch.tensor([[True, len(y) > 1] for y in COMPLETIONS])
SECOND = torch.tensor([0, *(y[0] - 1 for y in COMPLETIONS[1:])])  # which of the two distributions the second token is from
FIRST_ID = torch.tensor([y[0] for y in COMPLETIONS])
SECOND_ID = torch.tensor([0, *(y[1] for y in COMPLETIONS[1:])])
REWARD = torch.tensor([0.3, 1.0, 0.0, 0.5, -0.4, 0.2, 0.9], dtype=torch.float64)


def parameters(seed: int) -> torch.Tensor:
    """[3, 3] logits: the first token's distribution, and the second's after token 1 and after token 2."""
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


THETA, REFERENCE = parameters(0), parameters(1)


def token_logp(theta: torch.Tensor) -> torch.Tensor:
    """[7, 2] log-probability of every token of every completion; NaN where there is none."""
    logp = theta.log_softmax(-1)
    second = torch.where(INSIDE[:, 1], logp[1 + SECOND, SECOND_ID], float("nan"))
    return torch.stack([logp[0, FIRST_ID], second], dim=1)


def completion_logp(theta: torch.Tensor) -> torch.Tensor:
    return torch.where(INSIDE, token_logp(theta), 0.0).sum(1)


def gradient(of) -> torch.Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(of(theta), theta, allow_unused=True, materialize_grads=True)[0]


def batch_of(rows: torch.Tensor, group: torch.Tensor, reward: torch.Tensor, **more) -> Batch:
    """A batch whose row i is completion rows[i]; sampled on-policy, without engine gap."""
    logp = token_logp(THETA)[rows]
    size = len(rows)
    return Batch(
        tokens=torch.zeros(size, 3, dtype=torch.long),
        prompt_len=torch.ones(size, dtype=torch.long),
        completion_len=INSIDE[rows].sum(1),
        mask=INSIDE[rows],
        logp_rollout=logp,
        group=group,
        reward=reward,
        scorable=torch.ones(size, dtype=torch.bool),
        correct=reward > 0.4,
        truncated=torch.zeros(size, dtype=torch.bool),
        versions=torch.zeros(size, 2, dtype=torch.long),
        **more,
    )


def every_completion(objective: Objective, reward: torch.Tensor) -> torch.Tensor:
    """E_{y~π} of the gradient of Σₜ loss, each completion its own group."""
    rows = torch.arange(7)
    known = dict(logp_old=token_logp(THETA), logp_ref=token_logp(REFERENCE))
    batch = batch_of(rows, rows, reward, **known)
    prepared = objective.prepare(batch, 2)
    weight = completion_logp(THETA).exp()

    def expected(theta):
        per_token = objective.per_token(token_logp(theta), torch.zeros(7, 2, dtype=torch.float64), batch, prepared)
        return (weight * per_token.sum(1)).sum()

    return gradient(expected)


def zero_reward() -> torch.Tensor:
    return torch.zeros(7, dtype=torch.float64)


def kl_objective(loss_kl=None, reward_kl=None) -> Objective:
    return Objective(advantage=none, loss_kl=loss_kl, reward_kl=reward_kl)


# ── truths ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def reverse_kl(theta):
    logp, ref = completion_logp(theta), completion_logp(REFERENCE)
    return (logp.exp() * (logp - ref)).sum()


def forward_kl(theta):
    logp, ref = completion_logp(theta), completion_logp(REFERENCE)
    return (ref.exp() * (ref - logp)).sum()


def _per_position(theta, of):
    """Σ over prefixes of P(prefix) · KL of the next token, the prefixes' law held fixed."""
    p, q = theta.log_softmax(-1), REFERENCE.log_softmax(-1)
    first = THETA[0].softmax(-1)
    reach = torch.stack([torch.ones((), dtype=torch.float64), first[1], first[2]])
    return (reach * of(p, q)).sum()


def reverse_kl_per_position(theta):
    return _per_position(theta, lambda p, q: (p.exp() * (p - q)).sum(-1))


def forward_kl_per_position(theta):
    return _per_position(theta, lambda p, q: (q.exp() * (q - p)).sum(-1))


def kl_of_prefixes(theta):
    """KL of the first token's law, plus Σ p log(p/q) − p over completions with a second token (their p sum to < 1)."""
    p, q = theta.log_softmax(-1)[0], REFERENCE.log_softmax(-1)[0]
    logp, ref = completion_logp(theta), completion_logp(REFERENCE)
    long = INSIDE[:, 1]
    return (p.exp() * (p - q)).sum() + (logp.exp() * (logp - ref - 1))[long].sum()


def expected_reward(theta):
    return (completion_logp(theta).exp() * REWARD).sum()


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def differ(a, b):
    assert (a - b).norm() > 0.02 * b.norm()


# ── KL: value's gradient, by estimator, level and place ────────────────────────────────────────────────────────────


def test_the_truths_agree_with_finite_differences():
    for truth in (reverse_kl, forward_kl, expected_reward):
        numeric = torch.zeros_like(THETA)
        for place in itertools.product(range(3), range(3)):
            shift = torch.zeros_like(THETA)
            shift[place] = 1e-6
            numeric[place] = (truth(THETA + shift) - truth(THETA - shift)) / 2e-6
        torch.testing.assert_close(gradient(truth), numeric, rtol=1e-6, atol=1e-8)


def test_k1_in_the_loss_has_no_gradient():
    """F05: E[∇k1] = 0; the score term is what was dropped."""
    same(every_completion(kl_objective(LossKL(1.0, k1)), zero_reward()), torch.zeros_like(THETA))


def test_k2_in_the_loss():
    """Per token it drops every later token's KL; of the sequence it is exact; of prefixes the sum of their KLs."""
    per_token = every_completion(kl_objective(LossKL(1.0, k2)), zero_reward())
    same(per_token, gradient(reverse_kl_per_position))
    differ(per_token, gradient(reverse_kl))
    same(every_completion(kl_objective(LossKL(1.0, k2, per_sequence)), zero_reward()), gradient(reverse_kl))
    same(every_completion(kl_objective(LossKL(1.0, k2, per_prefix)), zero_reward()), gradient(kl_of_prefixes))


def test_k3_in_the_loss_is_forward():
    """Per token: the per-position forward KL. Of the sequence: the forward KL of completions. Never the reverse."""
    per_token = every_completion(kl_objective(LossKL(1.0, k3)), zero_reward())
    same(per_token, gradient(forward_kl_per_position))
    differ(per_token, gradient(reverse_kl))
    same(every_completion(kl_objective(LossKL(1.0, k3, per_sequence)), zero_reward()), gradient(forward_kl))


def test_rho_k3():
    """With the token's ratio unbiased per position and blind to later tokens; with the prefix ratio exact."""
    by_token = every_completion(kl_objective(LossKL(1.0, k3, ratio=token)), zero_reward())
    same(by_token, gradient(reverse_kl_per_position))
    differ(by_token, gradient(reverse_kl))
    same(every_completion(kl_objective(LossKL(1.0, k3, ratio=prefix)), zero_reward()), gradient(reverse_kl))


@pytest.mark.parametrize("to_go", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_k1_in_the_reward_is_exact(to_go, after):
    reward_kl = RewardKL(1.0, k1, to_go=to_go, after_normalising=after)
    same(every_completion(kl_objective(reward_kl=reward_kl), zero_reward()), gradient(reverse_kl))


def test_k3_in_the_reward_cancels_and_in_both_is_exact():
    in_reward = every_completion(kl_objective(reward_kl=RewardKL(1.0, k3)), zero_reward())
    same(in_reward, gradient(reverse_kl) - gradient(forward_kl_per_position))
    both = kl_objective(LossKL(1.0, k3), RewardKL(1.0, k3))
    same(every_completion(both, zero_reward()), gradient(reverse_kl))


@pytest.mark.parametrize(
    "loss_kl, reward_kl",
    [
        (None, RewardKL(0.5, k1)),
        (None, RewardKL(0.5, k1, to_go=True)),
        (LossKL(0.5, k2, per_sequence), None),
        (LossKL(0.5, k3, ratio=prefix), None),
        (LossKL(0.5, k3), RewardKL(0.5, k1)),
    ],
)
def test_one_step_down_the_penalty_comes_closer_to_the_reference(loss_kl, reward_kl):
    """F04: with no reward at all, a descent step must lower the KL, never raise it."""
    descent = every_completion(kl_objective(loss_kl, reward_kl), zero_reward())
    assert reverse_kl(THETA - 0.01 * descent) < reverse_kl(THETA)


# ── baselines and scales ───────────────────────────────────────────────────────────────────────────────────────────


def every_group(objective: Objective, size: int) -> torch.Tensor:
    """E over all groups of `size` completions of the gradient of the step's loss, each group a step of its own."""
    tuples = torch.tensor(list(itertools.product(range(7), repeat=size)))
    rows, group = tuples.flatten(), torch.arange(len(tuples)).repeat_interleave(size)
    batch = batch_of(rows, group, REWARD[rows])
    prepared = objective.prepare(batch, 1)
    weight = completion_logp(THETA)[tuples].sum(1).exp()
    lengths = INSIDE[rows].sum(1) if objective.aggregate is sequence_mean else torch.ones(len(rows))

    def expected(theta):
        logp = token_logp(theta)[rows]
        loss = objective.per_token(logp, torch.zeros_like(logp), batch, prepared).sum(1) / lengths
        return -(weight * loss.view(-1, size).mean(1)).sum()

    return gradient(expected)


def test_leave_one_out_is_unbiased():
    same(every_group(recipe("solid").objective, 3), gradient(expected_reward))


def test_the_group_mean_scales_the_gradient():
    """(G−1)/G of the truth: a matter of the learning rate."""
    for size in (2, 3):
        same(every_group(recipe("dr_grpo").objective, size), gradient(expected_reward) * (size - 1) / size)


def test_a_mean_per_completion_is_biased():
    """Not even a multiple of the truth, while the constant divisor is the truth itself."""
    truth = gradient(expected_reward)

    def off_direction(aggregate):
        got = every_group(replace(recipe("solid").objective, aggregate=aggregate), 2)
        return ((got - truth * (got * truth).sum() / truth.square().sum()).norm() / got.norm()).item()

    assert off_direction(constant_length_mean) < 1e-10
    assert off_direction(sequence_mean) > 0.03


def c_of(p: float, size: int) -> float:
    """By how much the group std weighs a prompt of pass rate p: E over k right of `size`, with the objective's code."""
    right = torch.arange(size) < torch.arange(size + 1)[:, None]  # [k, i]: group k has k right answers
    scored = Scored(
        reward=right.double().flatten(),
        group=torch.arange(size + 1).repeat_interleave(size),
        counted=torch.ones(right.numel(), dtype=torch.bool),
        mask=torch.ones(right.numel(), 1, dtype=torch.bool),
    )
    advantage = Advantage(group_mean, GroupStd(ddof=0, eps=0.0))(scored.reward[:, None], scored)[:, 0].view(size + 1, size)
    chance = torch.tensor([math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)], dtype=torch.float64)
    score = right.double() - p  # ∇ log-probability of a right or wrong answer, in the logit
    return ((chance * (advantage * score).mean(1)).sum() / (p * (1 - p))).item()


@pytest.mark.parametrize("p, c", [(0.001, 2.64), (0.01, 2.61), (0.05, 2.47), (0.1, 2.33), (0.3, 1.96), (0.5, 1.86)])
def test_the_group_std_reweights_prompts(p, c):
    assert c_of(p, 8) == pytest.approx(c, abs=0.005)


def test_two_batch_stds_are_two_numbers():
    """Prompts at .05 and .95: std of raw rewards .50, of centred rewards .22."""
    right = torch.cat([torch.arange(100) < 5, torch.arange(100) < 95])
    scored = Scored(
        reward=right.double(),
        group=torch.arange(2).repeat_interleave(100),
        counted=torch.ones(200, dtype=torch.bool),
        mask=torch.ones(200, 1, dtype=torch.bool),
    )
    returns = scored.reward[:, None]
    centred = Advantage(group_mean, RawBatchStd(ddof=0, eps=0.0))(returns, scored)
    by_centred = Advantage(group_mean, CentredBatchStd(ddof=0, eps=0.0))(returns, scored)
    deviation = scored.reward - torch.tensor([0.05, 0.95]).repeat_interleave(100)
    assert (deviation / centred[:, 0]).mean().item() == pytest.approx(0.50, abs=1e-3)
    assert (deviation / by_centred[:, 0]).mean().item() == pytest.approx(0.218, abs=1e-3)


# ── one update a batch ─────────────────────────────────────────────────────────────────────────────────────────────


def test_one_update_a_batch_makes_the_clip_idle():
    """(Q1) r ≡ 1: nothing is clipped, and .2/.2, .2/.28, none at all and REINFORCE give bit-equal gradients."""
    rows = torch.arange(7)
    solid = recipe("solid").objective
    grads = []
    for surrogate in (Clip(0.2, 0.2), Clip(0.2, 0.28), Clip(3e-4, 4e-4), Unclipped(), solid.surrogate):
        objective = replace(solid, surrogate=surrogate)
        batch = batch_of(rows, torch.zeros(7, dtype=torch.long), REWARD)
        prepared = objective.prepare(batch, 2)
        logp = token_logp(THETA).requires_grad_()
        counts = objective.counts(batch, prepared, 2)
        objective.loss(logp, torch.zeros_like(logp), batch, prepared, counts).backward()
        grads.append(logp.grad)
        assert not objective.clipped(logp, batch, prepared).any()
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_a_random_reward_expects_no_gradient_without_clipping_and_some_with():
    """Rewards ±1 by coin: E = 0 on-policy and with a bare ratio; a clip on stale data breaks the balance."""
    rows = torch.arange(7).repeat(2)
    coin = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(7)
    stale = token_logp(parameters(0) + 0.5 * parameters(3))

    def expected(surrogate):
        objective = Objective(advantage=none, surrogate=surrogate)
        batch = replace(batch_of(rows, torch.arange(14), coin), logp_old=stale[rows])
        prepared = Prepared(coin[:, None] * batch.mask, batch.mask, batch.group)
        weight = torch.where(INSIDE, stale, 0.0).sum(1).exp()[rows] / 2

        def loss(theta):
            logp = token_logp(theta)[rows]
            return (weight * objective.per_token(logp, torch.zeros_like(logp), batch, prepared).sum(1)).sum()

        return gradient(loss)

    same(expected(Unclipped()), torch.zeros_like(THETA))
    assert expected(Clip(0.2, 0.2)).norm() > 1e-2
