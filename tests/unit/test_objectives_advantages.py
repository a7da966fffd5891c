"""Advantages against the papers' formulas in plain loops, and the shaping before them."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from keel.errors import KeelError
from keel.objectives.advantages import (
    Advantage,
    CentredBatchStd,
    GroupStd,
    RawBatchStd,
    TokenStd,
    TokenWhitening,
    batch_mean,
    centred,
    group_mean,
    group_normalised,
    leave_one_out,
    none,
    sibling_mean,
    unscaled,
    zero,
)
from keel.objectives.objective import Objective
from keel.objectives.shaping import OverlongFilter, SoftOverlong
from keel.objectives.signals import Scored
from keel.types import Batch


def scored(reward, group, counted=None, mask=None, dtype=torch.float64) -> Scored:
    size = len(reward)
    return Scored(
        reward=torch.tensor(reward, dtype=dtype),
        group=torch.tensor(group),
        counted=torch.ones(size, dtype=torch.bool) if counted is None else torch.tensor(counted),
        mask=torch.ones(size, 1, dtype=torch.bool) if mask is None else torch.tensor(mask),
    )


def advantages(choice: Advantage, s: Scored) -> list[float]:
    """One per completion: that of its first token."""
    return choice(s.reward[:, None].expand(s.mask.shape), s)[:, 0].tolist()


UNEVEN = scored([1.0, 0.0, 1.0, 0.0, 0.0, 3.0, 2.0, 5.0], [4, 4, 4, 4, 9, 9, 9, 0])
LISTS = {4: [1.0, 0.0, 1.0, 0.0], 9: [0.0, 3.0, 2.0], 0: [5.0]}
ALL = [r for rewards in LISTS.values() for r in rewards]


def by_loop(of):
    """Expected advantages: `of(reward, its group's rewards, the others')` for each completion, group after group."""
    out = []
    for rewards in LISTS.values():
        out += [of(r, rewards, rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    return pytest.approx(out)


def test_centred():
    # group 4: mean .5; group 9: mean 5/3; group 0 is alone: 5 − 5 = 0
    assert advantages(centred, UNEVEN) == by_loop(lambda r, all_, others: r - statistics.mean(all_))


def test_leave_one_out():
    # 1 − (0+1+0)/3 = 2/3, …; alone in its group a completion teaches nothing (F06: never its raw reward)
    assert advantages(leave_one_out, UNEVEN) == by_loop(lambda r, _, others: r - statistics.mean(others or [r]))
    assert advantages(leave_one_out, UNEVEN)[-1] == 0.0


@pytest.mark.parametrize("ddof, std", [(0, statistics.pstdev), (1, statistics.stdev)])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.5])
def test_group_std(ddof, std, eps):
    def of(r, all_, others):
        return (r - statistics.mean(all_)) / (std(all_) + eps) if others else 0.0

    assert advantages(Advantage(group_mean, GroupStd(ddof=ddof, eps=eps)), UNEVEN) == by_loop(of)


def test_grpo_in_numbers():
    # rewards 1 0 0 0: mean .25, sample std .5; (.75, −.25, −.25, −.25) / .5001
    got = advantages(group_normalised, scored([1.0, 0.0, 0.0, 0.0], [7, 7, 7, 7]))
    assert got == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)


def test_batch_statistics():
    """F25: none, group and batch are three answers; rewards A 0 1, B 10 20."""
    s = scored([0.0, 1.0, 10.0, 20.0], [0, 0, 1, 1])
    assert advantages(none, s) == [0.0, 1.0, 10.0, 20.0]
    assert advantages(Advantage(batch_mean, unscaled), s) == [-7.75, -6.75, 2.25, 12.25]  # mean 31/4
    assert advantages(centred, s) == [-0.5, 0.5, -5.0, 5.0]
    group = Advantage(group_mean, GroupStd(ddof=0, eps=0.0))
    assert advantages(group, s) == pytest.approx([-1.0, 1.0, -1.0, 1.0])
    raw = Advantage(group_mean, RawBatchStd(ddof=0, eps=0.0))
    std = statistics.pstdev([0, 1, 10, 20])
    assert advantages(raw, s) == pytest.approx([-0.5 / std, 0.5 / std, -5 / std, 5 / std])
    of_centred = Advantage(group_mean, CentredBatchStd(ddof=0, eps=0.0))
    std = statistics.pstdev([-0.5, 0.5, -5, 5])
    assert advantages(of_centred, s) == pytest.approx([-0.5 / std, 0.5 / std, -5 / std, 5 / std])


def test_batch_std_over_uneven_groups():
    got = advantages(Advantage(group_mean, RawBatchStd(ddof=1, eps=1e-4)), UNEVEN)
    std = statistics.stdev(ALL) + 1e-4
    assert got == by_loop(lambda r, all_, _: (r - statistics.mean(all_)) / std)


def test_whitening_as_published():
    """REINFORCE++: (A − mean)/√(var + 1e-8) over tokens, so a completion counts as often as it has tokens."""
    s = scored([1.0, 0.0], [0, 1], mask=[[True, True, True], [True, False, False]])
    values = [1.0, 1.0, 1.0, 0.0]  # tokens, not completions: mean .75, variance 3/16
    std = (statistics.pvariance(values) + 1e-8) ** 0.5
    got = Advantage(zero, TokenWhitening())(s.reward[:, None].expand(2, 3), s)
    assert got[0].tolist() == pytest.approx([0.25 / std] * 3)
    assert got[1].tolist() == pytest.approx([-0.75 / std, 0.0, 0.0])


def test_whitening_after_a_group_baseline_is_a_trap_and_two_ways_out():
    """Three groups; the wrong answers of the first are long. Whitened, a group that is wrong throughout is praised."""
    mask = torch.arange(9) < torch.tensor([9, 9, 1, 2, 2, 2])[:, None]
    s = scored([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1, 2, 2], mask=mask.tolist())
    trapped = advantages(Advantage(group_mean, TokenWhitening()), s)
    assert trapped[4] > 0.1 and trapped[5] > 0.1  # group 2: all wrong
    for scale in (TokenStd(), CentredBatchStd()):
        freed = advantages(Advantage(group_mean, scale), s)
        assert freed[3:] == [0.0, 0.0, 0.0]
        assert freed[0] < 0 < freed[2]


SCALES = (unscaled, GroupStd(0, 0.0), GroupStd(1, 1e-9), RawBatchStd(0, 0.0), CentredBatchStd(1, 0.0))
SCALES = (*SCALES, TokenWhitening(), TokenStd())


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("baseline", [group_mean, sibling_mean, batch_mean])
def test_equal_rewards_give_exactly_zero(size, dtype, baseline):
    """F28, F30: seven times .1 has a standard deviation of 8e-9 in fp32; here it is nothing, in every precision."""
    for value, scale in itertools.product((0.1, 0.2, 1.0, 3.0, 0.5), SCALES):
        s = scored([value] * size, [3] * size, dtype=dtype)
        assert advantages(Advantage(baseline, scale), s) == [0.0] * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitening_alone_gives_exactly_zero_too(dtype):
    """Without a baseline it is the whitening's own mean that must meet every value."""
    for size, value in itertools.product((1, 3, 7), (0.1, 0.2, 3.3)):
        s = scored([value] * size, [0] * size, mask=[[True] * 3] * size, dtype=dtype)
        assert (Advantage(zero, TokenWhitening())(s.reward[:, None].expand(size, 3), s) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_group_beside_a_live_one_is_exactly_zero(dtype):
    s = scored([0.1] * 7 + [1.0, 0.0], [0] * 7 + [1] * 2, dtype=dtype)
    for baseline, scale in itertools.product((group_mean, sibling_mean), SCALES):
        if isinstance(scale, TokenWhitening):
            continue  # it shifts; that is its trap
        got = advantages(Advantage(baseline, scale), s)
        assert got[:7] == [0.0] * 7 and got[7] > 0 > got[8]


def test_fresh_ids_do_not_turn_into_raw_rewards():
    """F06: two prompts of four samples are two groups that sum to zero; eight singletons teach nothing."""
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    got = advantages(centred, scored(rewards, [0] * 4 + [1] * 4))
    assert sum(got[:4]) == pytest.approx(0) and sum(got[4:]) == pytest.approx(0) and got[0] == 0.5
    for choice in (centred, leave_one_out, group_normalised):
        assert advantages(choice, scored(rewards, list(range(8)))) == [0.0] * 8


def test_groups_with_the_same_text_stay_apart():
    """F07: 16 wrong and 16 right answers of two instances of one prompt: 0, and not 16/31."""
    s = scored([0.0] * 16 + [1.0] * 16, [0] * 16 + [1] * 16)
    assert advantages(leave_one_out, s) == [0.0] * 32


@pytest.mark.parametrize("seed", range(5))
def test_survivors_of_any_drop_match_a_dictionary(seed):
    """F08: after completions fell out, groups are still found by id."""
    g = torch.Generator().manual_seed(seed)
    reward, group = torch.rand(12, generator=g, dtype=torch.float64), torch.arange(3).repeat_interleave(4)
    alive = torch.rand(12, generator=g) > 0.4
    order = torch.randperm(12, generator=g)
    s = scored(reward[order].tolist(), group[order].tolist(), counted=alive[order].tolist())
    got = dict(zip(order.tolist(), advantages(leave_one_out, s), strict=True))
    for i in range(12):
        others = [reward[j].item() for j in range(12) if alive[j] and group[j] == group[i] and j != i]
        expected = reward[i].item() - statistics.mean(others) if alive[i] and others else 0.0
        if alive[i]:
            assert got[i] == pytest.approx(expected)


def test_b_equal_to_t_does_not_broadcast():
    """F33: with four completions of four tokens a [B] against [B, T] would silently make a [B, B]."""
    s = scored([1.0, 0.0, 3.0, 0.0], [0, 0, 1, 1], mask=[[True] * 4] * 4)
    for choice in (centred, leave_one_out, group_normalised, Advantage(group_mean, TokenWhitening())):
        got = choice(s.reward[:, None].expand(4, 4), s)
        assert (got == got[:, :1]).all()
        assert (got[0] > 0).all() and (got[1] < 0).all()


def test_std_refuses_nonsense():
    with pytest.raises(KeelError, match="ddof"):
        GroupStd(ddof=2)
    with pytest.raises(KeelError, match="eps"):
        RawBatchStd(eps=-1.0)


# ── shaping ────────────────────────────────────────────────────────────────────────────────────────────────────────


def batch(reward, length, truncated, group=None) -> Batch:
    size, width = len(reward), max(length)
    inside = torch.arange(width) < torch.tensor(length)[:, None]
    return Batch(
        tokens=torch.zeros(size, width + 1, dtype=torch.long),
        prompt_len=torch.ones(size, dtype=torch.long),
        completion_len=torch.tensor(length),
        mask=inside,
        logp_rollout=torch.zeros(size, width),
        group=torch.tensor(group or [0] * size),
        reward=torch.tensor(reward),
        scorable=torch.ones(size, dtype=torch.bool),
        correct=torch.tensor(reward) > 0.5,
        truncated=torch.tensor(truncated),
        versions=torch.zeros(size, width, dtype=torch.long),
    )


@pytest.mark.parametrize(
    "length, lost",
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0)],
)
def test_soft_overlong(length, lost):
    """F80: cap 20480, cache 4096."""
    b = batch([0.0, 0.0], [1, 1], [False, False])
    object.__setattr__(b, "completion_len", torch.tensor([length, 0]))
    s = SoftOverlong(buffer_share=0.2)(scored([0.0, 0.0], [0, 0]), b, 20480)
    assert s.reward.tolist() == pytest.approx([lost, 0.0], abs=1e-12)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_soft_overlong_refuses_a_buffer_beyond_the_cap(share):
    with pytest.raises(KeelError, match="buffer_share"):
        SoftOverlong(buffer_share=share)


def test_the_punishment_enters_the_advantage_and_not_the_verdict():
    b = batch([1.0, 1.0], [2, 10], [False, False])
    prepared = Objective(advantage=centred, shaping=(SoftOverlong(0.5),)).prepare(b, 10)
    # rewards 1 and 1 − 1 = 0: mean .5
    assert prepared.advantage[:, 0].tolist() == [0.5, -0.5]


def test_a_filtered_completion_leaves_the_baseline():
    """F15: rewards [100 (truncated), 1]: the whole one is alone, so 0 and not −49.5."""
    b = batch([100.0, 1.0, 1.0, 0.0], [3, 2, 2, 2], [True, False, False, False], group=[0, 0, 1, 1])
    objective = Objective(advantage=centred, shaping=(OverlongFilter(),))
    prepared = objective.prepare(b, 4)
    assert prepared.advantage[:, 0].tolist() == [0.0, 0.0, 0.5, -0.5]
    assert not prepared.mask[0].any()
    kept = Objective(advantage=centred, shaping=(OverlongFilter(in_baseline=True),)).prepare(b, 4)
    assert kept.advantage[:, 0].tolist() == [0.0, -49.5, 0.5, -0.5]


def test_a_filtered_completion_leaves_the_denominator():
    """F21: 30 tokens of which 5 are filtered: the loss is divided by 25."""
    b = batch([1.0, 0.0, 1.0], [5, 10, 15], [True, False, False])
    objective = Objective(shaping=(OverlongFilter(),))
    counts = objective.counts(b, objective.prepare(b, 15), 15)
    assert (counts.tokens, counts.completions, counts.prompts) == (25, 2, 1)
