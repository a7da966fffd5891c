"""The audit audited: each classic mistake, made on purpose, breaks the claim that speaks of it."""

from dataclasses import dataclass, replace

import pytest
import torch

from keel.audit.certificate import judge
from keel.objectives import aggregate, kl
from keel.objectives.advantages import Advantage, GroupStd, group_mean
from keel.objectives.estimators import ESTIMATORS
from keel.objectives.kl import LossKL, RewardKL
from keel.objectives.objective import Objective
from keel.objectives.recipes import RECIPES
from keel.objectives.signals import Prepared
from keel.objectives.surrogates import Surrogate


def flipped_sign(objective):
    return replace(objective, loss_kl=replace(objective.loss_kl, estimator=lambda d: -kl.k3(d)))


@dataclass(frozen=True)
class WithoutStopGradient(Surrogate):
    """The advantage holds the live log-ratio to the reference: k1 in the reward, differentiated too."""

    def __call__(self, view):
        return -(view.advantage - 0.05 * view.ref_log_ratio) * view.logp


def forgotten_stop_gradient(objective):
    return replace(objective, surrogate=WithoutStopGradient())


def own_token_mean(loss, prepared, counts):
    return (loss * prepared.mask).sum() / prepared.mask.sum().clamp(min=1)


def mean_per_micro_batch(objective):
    return replace(objective, aggregate=own_token_mean)


@dataclass(frozen=True)
class Unmasked(Objective):
    """Padding is trained as if it had been sampled."""

    def prepare(self, batch, max_tokens):
        prepared = super().prepare(batch, max_tokens)
        advantage = prepared.advantage[:, :1].expand_as(prepared.advantage)
        return Prepared(advantage, torch.ones_like(prepared.mask), prepared.group)

    def loss(self, logp, entropy, batch, prepared, counts):
        return aggregate.token_mean(-prepared.advantage * logp.exp(), prepared, counts)


def dropped_mask(objective):
    return Unmasked(**vars(objective))


def swapped_reference(objective):
    estimator = objective.reward_kl.estimator
    return replace(objective, reward_kl=replace(objective.reward_kl, estimator=lambda d: estimator(-d)))


def other_ddof(objective):
    """ddof 0 where 1 is meant."""
    return replace(objective, advantage=Advantage(group_mean, GroupStd(ddof=0)))


def clamped(objective):
    return replace(objective, loss_kl=replace(objective.loss_kl, estimator=lambda d: kl.k3(d).clamp(-0.1, 0.1)))


@dataclass(frozen=True)
class OwnTokenOnly(RewardKL):
    """Each token pays for itself alone: the reward-to-go is forgotten."""

    def penalty(self, d, mask):
        paid = self.kl_coef * self.estimator(d) * mask
        return paid, paid.sum(1)


def without_to_go(objective):
    return replace(objective, reward_kl=OwnTokenOnly(1.0, kl.k1, to_go=True))


MUTATIONS = [
    (flipped_sign, ESTIMATORS["k3_in_loss"], "-forward_kl_positions"),
    (forgotten_stop_gradient, RECIPES["solid"], "J"),
    (mean_per_micro_batch, ESTIMATORS["token_mean"], "J"),
    (dropped_mask, ESTIMATORS["constant_length_mean"], "J"),
    (swapped_reference, ESTIMATORS["k1_in_reward"], "-reverse_kl"),
    (other_ddof, ESTIMATORS["group_std"], "J_group_std"),
    (clamped, ESTIMATORS["k3_in_loss"], "-forward_kl_positions"),
    (without_to_go, ESTIMATORS["k1_in_reward_to_go"], "-reverse_kl"),
]


@pytest.mark.parametrize("mutate, subject, truth", MUTATIONS, ids=lambda x: getattr(x, "__name__", getattr(x, "name", x)))
def test_the_audit_catches_it_and_names_the_claim(mutate, subject, truth):
    healthy = [judge(subject.name, subject.objective, claim) for claim in subject.claims]
    assert all(certificate.holds for certificate in healthy)
    broken = [c for claim in subject.claims if not (c := judge(subject.name, mutate(subject.objective), claim)).holds]
    assert truth in {certificate.claim.truth for certificate in broken}


def test_a_loss_that_follows_the_reference_instead_of_leaving_it_is_seen_in_the_sign():
    wrong = Objective(loss_kl=LossKL(1.0, lambda d: -kl.k2(d)))
    claim = ESTIMATORS["k2_in_loss"].claims[1]
    certificate = judge("k2_in_loss", wrong, claim)
    assert not certificate.holds and certificate.worst.cosine == pytest.approx(-1.0)
