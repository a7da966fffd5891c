"""Through the real step, for every recipe: micro-batches, padding, row order and ranks are invisible, and so is what is masked."""

import dataclasses

import pytest
import torch

from keel.objectives.recipes import RECIPES
from keel.training.batch import micro_batches
from keel.training.step import accumulate_gradient, apply_gradient, log_probabilities
from keel.types import Batch

CAP = 9
TEMPERATURE = 0.8


@pytest.fixture
def policy(make_policy):
    policy = make_policy()
    policy.model.double()
    return policy


def make_batch(policy, seed=0):
    """Five groups of unequal size, stale log-probabilities, an engine gap, truncated and unscorable completions."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0] * 4 + [1] * 3 + [2] * 5 + [3] * 2 + [4] * 4)
    rows = len(group)
    prompt_len = torch.tensor([3, 5, 2, 4, 6])[group]
    completion_len = torch.randint(1, CAP + 1, (rows,), generator=generator)
    prompts = torch.randint(2, 60, (5, 6), generator=generator)
    tokens = torch.randint(2, 6, (rows, int((prompt_len + completion_len).max())), generator=generator)
    for row in range(rows):
        tokens[row, : prompt_len[row]] = prompts[group[row], : prompt_len[row]]
    inside = torch.arange(int(completion_len.max())) < completion_len[:, None]
    scorable = torch.ones(rows, dtype=torch.bool)
    scorable[[2, 9]] = False
    correct = torch.rand(rows, generator=generator) < 0.5
    batch = Batch(
        tokens=tokens, prompt_len=prompt_len, completion_len=completion_len, mask=inside & scorable[:, None],
        logp_rollout=torch.zeros(inside.shape, dtype=torch.float64), group=group,
        reward=torch.where(scorable, correct.double(), torch.nan), scorable=scorable, correct=correct & scorable,
        truncated=completion_len == CAP, versions=torch.zeros(inside.shape, dtype=torch.long),
    )  # fmt: skip
    logp = log_probabilities(policy, batch, [torch.arange(rows)], TEMPERATURE)

    def near(scale):
        return logp + scale * torch.randn(logp.shape, generator=generator, dtype=torch.float64)

    return dataclasses.replace(batch, logp_old=near(0.2), logp_ref=near(0.3), logp_rollout=near(0.25))


def gradient(policy, objective, batch, cuts, prepared=None, counts=None):
    policy.model.zero_grad()
    prepared = objective.prepare(batch, CAP) if prepared is None else prepared
    counts = objective.counts(batch, prepared, CAP) if counts is None else counts
    accumulate_gradient(policy, objective, batch, prepared, counts, cuts, TEMPERATURE)
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters().values()])


@pytest.fixture(params=sorted(RECIPES))
def objective(request):
    return RECIPES[request.param].objective


def whole(batch):
    return [torch.arange(len(batch))]


def test_any_cut_into_micro_batches(policy, objective):
    batch = make_batch(policy)
    expected = gradient(policy, objective, batch, whole(batch))
    assert expected.norm() > 0
    singles = [torch.tensor([row]) for row in range(len(batch))]
    crossing = list(torch.tensor_split(torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)), 4))
    for cuts in (micro_batches(batch, 20), micro_batches(batch, 50), singles, crossing):
        torch.testing.assert_close(
            gradient(policy, objective, batch, cuts), expected, rtol=1e-6, atol=1e-9 * float(expected.norm())
        )


def test_any_number_of_virtual_ranks(policy, objective):
    """Each rank holds some rows and knows the step's counts; the sum over ranks is the gradient."""
    batch = make_batch(policy)
    prepared = objective.prepare(batch, CAP)
    counts = objective.counts(batch, prepared, CAP)
    expected = gradient(policy, objective, batch, whole(batch))
    for ranks in (2, 3, 4):
        total = torch.zeros_like(expected)
        for rank in range(ranks):
            rows = torch.arange(rank, len(batch), ranks)
            total += gradient(policy, objective, batch.rows(rows), [torch.arange(len(rows))], prepared.rows(rows), counts)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))


def test_row_order_and_padding(policy, objective):
    batch = make_batch(policy)
    expected = gradient(policy, objective, batch, whole(batch))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(2))
    shuffled = gradient(policy, objective, batch.rows(order), whole(batch))
    torch.testing.assert_close(shuffled, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))

    def wider(value, fill):
        return torch.cat((value, torch.full((len(value), 7), fill, dtype=value.dtype)), 1)

    fills = dict(tokens=3, mask=False, versions=-1, logp_rollout=torch.nan, logp_old=torch.inf, logp_ref=torch.nan)
    padded = dataclasses.replace(batch, **{name: wider(getattr(batch, name), fill) for name, fill in fills.items()})
    torch.testing.assert_close(
        gradient(policy, objective, padded, whole(batch)), expected, rtol=1e-6, atol=1e-9 * float(expected.norm())
    )


def test_masked_is_absent(policy, objective):
    """Junk under the mask, and in everything of an unscorable completion, changes no bit of the gradient."""
    batch = make_batch(policy)
    expected = gradient(policy, objective, batch, whole(batch))
    for junk in (torch.nan, torch.inf, -1e30, 99.0):
        spoiled = {name: torch.where(batch.mask, getattr(batch, name), junk) for name in ("logp_rollout", "logp_old", "logp_ref")}
        spoiled["reward"] = torch.where(batch.scorable, batch.reward, junk)
        assert torch.equal(gradient(policy, objective, dataclasses.replace(batch, **spoiled), whole(batch)), expected)


def test_a_gradient_that_is_not_finite_changes_nothing(policy):
    objective = RECIPES["solid"].objective
    batch = make_batch(policy)
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, fused=True)
    gradient(policy, objective, batch, whole(batch))
    apply_gradient(parameters, optimizer, 1.0)
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in parameters.items()}
    gradient(policy, objective, batch, whole(batch))
    name = sorted(parameters)[3]
    parameters[name].grad.view(-1)[5] = torch.nan
    applied = apply_gradient(parameters, optimizer, 1.0)
    assert applied.non_finite == name
    assert all(torch.equal(weights[n], p) for n, p in parameters.items())
    assert all(torch.equal(moments[n], optimizer.state[p]["exp_avg"]) for n, p in parameters.items())


def test_the_gradient_is_clipped_to_its_norm(policy):
    batch, objective = make_batch(policy), RECIPES["solid"].objective
    parameters = policy.parameters()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
    expected = gradient(policy, objective, batch, whole(batch))
    applied = apply_gradient(parameters, optimizer, float(expected.norm()) / 4)
    moved = torch.cat([p.detach().flatten() for p in parameters.values()]) - before
    assert applied.grad_norm == pytest.approx(float(expected.norm()))
    torch.testing.assert_close(moved, -expected / 4)
