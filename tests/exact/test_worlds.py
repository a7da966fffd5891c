"""The enumerated worlds themselves: probabilities sum to one, multisets stand for tuples, and what is too large is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from keel.errors import KeelError
from keel.exact.expectation import Outcomes, count_batches, enumerate_batches, expect, token_gradients
from keel.exact.truths import TRUTHS, gradient, numeric_gradient
from keel.exact.world import Setting, Tree, World
from keel.objectives.advantages import none
from keel.objectives.objective import Objective
from keel.objectives.recipes import recipe

SETTINGS = {
    "plain": Setting(),
    "three tokens": Setting(max_tokens=3, vocabulary=4, prompts=1),
    "shared features": Setting(policy="shared", drift=0.3, gap=0.2),
    "experts": Setting(policy="moe", drift=0.3),
    "nucleus": Setting(top_p=0.7),
    "noisy grader": Setting(tpr=0.8, fpr=0.1, favours_long=0.3),
    "coin": Setting(reward="coin"),
    "dynamic sampling": Setting(live_only=True, group_size=3, vocabulary=2),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_probabilities_sum_to_one(setting):
    world = World.random(setting, 0)
    for table in (world.now, world.old, world.sampler, world.ref):
        assert world.tree.of_completions(table).exp().sum(1).tolist() == pytest.approx([1.0] * setting.prompts)
    outcomes = Outcomes.of(world)
    for prompt in range(setting.prompts):
        assert outcomes.chance[outcomes.prompt == prompt].sum().item() == pytest.approx(1.0)
    _, chance = enumerate_batches(setting, outcomes)
    assert chance.sum().item() == pytest.approx(1.0)


def test_a_tree_holds_every_completion_once():
    """V 3, T 3: 1 + 2 that end early, 4·1 after two tokens, 8 that the cap cuts off."""
    tree = Tree.of(3, 3)
    assert tree.tokens.shape == (15, 3)
    assert len({tuple(row) for row in torch.where(tree.mask, tree.tokens, -1).tolist()}) == 15
    assert tree.truncated.sum() == 8
    assert sorted(tree.lengths.tolist()) == [1] + [2] * 2 + [3] * 12


def test_knobs_that_are_numbers_change_nothing_else():
    quiet, stale = World.random(Setting(), 0), World.random(Setting(drift=0.5), 0)
    assert torch.equal(quiet.old, stale.old) and torch.equal(quiet.ref, stale.ref)
    assert not torch.equal(quiet.now, stale.now)
    half = World.random(Setting(drift=0.25), 0)
    torch.testing.assert_close(stale.theta - stale.theta_old, 2 * (half.theta - half.theta_old))


@pytest.mark.parametrize("name", ["solid", "grpo", "reinforce_pp", "deepseek_v32"])
def test_multisets_expect_what_all_tuples_expect(name):
    """The brute force: every ordered batch of 2 × 2 completions, one after the other through the real loss."""
    world = World.random(Setting(vocabulary=2, drift=0.2, gap=0.1), 3)
    outcomes, loss = Outcomes.of(world), recipe(name).objective
    of_prompt = [(outcomes.prompt == p).nonzero()[:, 0].tolist() for p in (0, 1)]
    jacobian = torch.autograd.functional.jacobian(lambda theta: world.tree.of_tokens(world.policy(theta)), world.theta)
    total = torch.zeros_like(world.theta)
    for a in itertools.product(of_prompt[0], repeat=2):
        for b in itertools.product(of_prompt[1], repeat=2):
            rows = torch.tensor([[*a, *b]])
            by_logp, _ = token_gradients(world, outcomes, loss, rows)
            slopes = jacobian[outcomes.prompt[rows[0]], outcomes.completion[rows[0]]]
            total -= outcomes.chance[rows[0]].prod() * torch.einsum("bt,btd->d", by_logp[0], slopes)
    torch.testing.assert_close(expect(world, loss).direction, total, rtol=1e-10, atol=1e-12)


def test_the_variance_is_that_of_the_batches():
    """REINFORCE with one completion a batch: E‖g‖² by hand."""
    world = World.random(Setting(prompts=1, group_size=1), 0)
    objective = recipe("solid").objective
    bare = replace(objective, advantage=none)
    chance = world.tree.of_completions(world.now).exp()[0]
    scores = torch.autograd.functional.jacobian(lambda t: world.tree.of_completions(world.policy(t))[0], world.theta)
    each = scores * world.reward[0][:, None]
    mean = chance @ each
    assert expect(world, bare).variance == pytest.approx(float(chance @ each.square().sum(1) - mean.square().sum()))


@pytest.mark.parametrize(
    "setting", [Setting(), Setting(max_tokens=3, prompts=1, policy="shared"), Setting(policy="moe", drift=0.2)]
)
@pytest.mark.parametrize("name", TRUTHS)
def test_truths_agree_with_finite_differences(name, setting):
    world = World.random(setting, 5)
    found, numeric = gradient(world, name), numeric_gradient(world, name)
    assert (found - numeric).norm() <= 1e-6 * max(1e-3, found.norm())


def test_the_law_of_the_cost():
    """C(K + G − 1, G) multisets a prompt, to the power of prompts."""
    world = World.random(Setting(group_size=3), 0)
    rows, _ = enumerate_batches(world.setting, Outcomes.of(world))
    assert len(rows) == math.comb(7 + 2, 3) ** 2 == count_batches(world.setting, 7)


def test_a_world_that_is_too_large_is_refused_with_one_that_fits():
    with pytest.raises(KeelError, match=r"make [\d,]+ batches.*prompts=2 with group_size=2 fits"):
        expect(World.random(Setting(max_tokens=3, group_size=4), 0), Objective())


@pytest.mark.parametrize(
    "knobs, match",
    [
        ({"drfit": 1}, "did you mean 'drift'"),
        ({"reward": "anser"}, "did you mean 'answer'"),
        ({"vocabulary": 1}, "at least 2"),
        ({"tpr": 1.5}, "between 0 and 1"),
        ({"fpr": 0.7, "favours_long": 0.7}, "between 0 and 1"),
    ],
)
def test_impossible_knobs_are_refused(knobs, match):
    with pytest.raises(KeelError, match=match):
        Setting.of(knobs)
