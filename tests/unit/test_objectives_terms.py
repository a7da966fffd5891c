"""Surrogates, log-ratios, corrections and KL: each paper's formula in plain Python, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from keel.errors import KeelError
from keel.objectives import corrections as fix
from keel.objectives import kl, log_ratios
from keel.objectives.objective import Objective
from keel.objectives.signals import TokenView
from keel.objectives.surrogates import Cispo, Clip, DualClip, Gmpo, MiniRL, Reinforce, Sapo, Surrogate, Unclipped

MASK = torch.tensor([[True, True, True], [True, True, False]])


def view(advantage, log_ratio, gap=None, ref=None, mask=MASK) -> TokenView:
    """Two completions of three and two tokens; logp is −1 everywhere, and what the gradient is asked of."""

    def table(rows):
        out = torch.zeros(mask.shape, dtype=torch.float64)
        for i, row in enumerate(rows or []):
            out[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return out

    logp = torch.full(mask.shape, -1.0, dtype=torch.float64).requires_grad_()
    ratio = table(log_ratio)
    return TokenView(
        logp=logp,
        log_ratio=ratio,
        importance=log_ratios.own_gradient(ratio, logp),
        gap=table(gap),
        ref_log_ratio=table(ref) + logp - logp.detach(),
        entropy=torch.zeros_like(ratio),
        advantage=table(advantage),
        mask=mask,
    )


def tokens(value: torch.Tensor, mask=MASK) -> list[float]:
    return value[mask].tolist()


def slopes(loss: torch.Tensor, at: TokenView) -> list[float]:
    """d loss / d logp of each trained token."""
    return tokens(torch.autograd.grad(loss[at.mask].sum(), at.logp)[0])


A = [[1.0, 1.0, 1.0], [-2.0, -2.0]]
RATIOS = [[1.5, 1.1, 0.5], [0.5, 4.0]]
LOG = [[math.log(r) for r in row] for row in RATIOS]
PAIRS = [(a, r) for row_a, row_r in zip(A, RATIOS, strict=True) for a, r in zip(row_a, row_r, strict=True)]


def test_reinforce_and_unclipped():
    at = view(A, LOG)
    assert tokens(Reinforce()(at)) == [1.0, 1.0, 1.0, -2.0, -2.0]  # −A · (−1)
    assert slopes(Reinforce()(at), at) == [-1.0, -1.0, -1.0, 2.0, 2.0]
    assert tokens(Unclipped()(at)) == pytest.approx([-a * r for a, r in PAIRS])


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.05, 0.6), (1.0, 3.5)])
def test_clip(low, high):
    at, surrogate = view(A, LOG), Clip(low, high)
    expected = [-min(a * r, a * min(max(r, 1 - low), 1 + high)) for a, r in PAIRS]
    assert tokens(surrogate(at)) == pytest.approx(expected)
    free = [a * r <= a * min(max(r, 1 - low), 1 + high) for a, r in PAIRS]  # the unclipped branch is the minimum
    assert slopes(surrogate(at), at) == pytest.approx([-a * r if f else 0.0 for (a, r), f in zip(PAIRS, free, strict=True)])
    assert tokens(surrogate.bound(at)) == [not f for f in free]


def test_dual_clip():
    at, surrogate = view(A, LOG), DualClip(0.2, 0.2, dual=3.0)

    def of(a, r):
        clipped = min(a * r, a * min(max(r, 0.8), 1.2))
        return -max(clipped, 3.0 * a) if a < 0 else -clipped

    assert tokens(surrogate(at)) == pytest.approx([of(a, r) for a, r in PAIRS])
    assert slopes(surrogate(at), at) == pytest.approx([0.0, -1.1, -0.5, 0.0, 0.0])  # r = 4 at A < 0 is beyond 3
    assert tokens(surrogate.bound(at)) == [True, False, False, True, True]


def test_cispo():
    at, surrogate = view(A, LOG), Cispo(cap=1.2)
    assert tokens(surrogate(at)) == pytest.approx([-min(r, 1.2) * a * -1.0 for a, r in PAIRS])
    assert slopes(surrogate(at), at) == pytest.approx([-min(r, 1.2) * a for a, r in PAIRS])
    assert tokens(surrogate.bound(at)) == [True, False, False, False, True]
    assert Cispo.one_plus(0.28) == Cispo(cap=1.28)


def test_minirl():
    """The mask looks at r, the weight is ρ = r · w, truncated at 5."""
    gap = [[0.1, 0.2, -0.3], [0.4, 0.5]]
    at, surrogate = view(A, LOG, gap), MiniRL(0.2, 0.27, 5.0)
    w = [math.exp(g) for row in gap for g in row]

    def of(a, r, w):
        masked = (a > 0 and r > 1.27) or (a < 0 and r < 0.8)
        return 0.0 if masked else -min(r * w, 5.0) * a

    expected = [of(a, r, w) for (a, r), w in zip(PAIRS, w, strict=True)]
    assert slopes(surrogate(at), at) == pytest.approx(expected)
    assert expected[-1] == 10.0  # 4 · e^.5 = 6.6 → 5, times −(−2)
    assert tokens(surrogate(at)) == pytest.approx([-e for e in expected])


def test_gmpo():
    """A · (Πₜ clipped ratio)^(1/|y|): the mean of tokens is the completion's own term, as is its gradient."""
    at, surrogate = view(A, LOG), Gmpo(0.4)
    up = [min(math.log(r), 0.4) for r in RATIOS[0]]
    down = [max(math.log(r), -0.4) for r in RATIOS[1]]
    means = [math.exp(sum(up) / 3), math.exp(sum(down) / 2)]
    assert tokens(surrogate(at)) == pytest.approx([-means[0]] * 3 + [2 * means[1]] * 2)
    # ln 1.5 > .4 and ln .5 < −.4 are bound, and give no gradient
    assert slopes(surrogate(at), at) == pytest.approx([0.0, -means[0], -means[0], 0.0, 2 * means[1]])
    assert tokens(surrogate.bound(at)) == [True, False, False, True, False]


def test_sapo():
    at, surrogate = view(A, LOG), Sapo(1.0, 1.05)

    def gate(a, r):
        tau = 1.0 if a > 0 else 1.05
        return 4 / tau / (1 + math.exp(-tau * (r - 1)))

    assert tokens(surrogate(at)) == pytest.approx([-a * gate(a, r) for a, r in PAIRS])
    there = view(A, [[0.0] * 3, [0.0] * 2])
    assert slopes(surrogate(there), there) == pytest.approx([-1.0] * 3 + [2.0] * 2)  # at r = 1 the slope is A


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clip(0.0, 0.2),
        lambda: Clip(1.5, 0.2),
        lambda: Clip(0.2, 0.0),
        lambda: DualClip(dual=1.0),
        lambda: Cispo(cap=0.28),
        lambda: MiniRL(cap=0.5),
        lambda: MiniRL(clip_low=-0.1),
        lambda: Gmpo(0.0),
        lambda: Sapo(tau_positive=0.0),
        lambda: fix.TruncateToken(0.5),
        lambda: fix.MaskToken(1.1, 5.0),
        lambda: fix.MaskSequence(0.0, 0.9),
        lambda: fix.RejectGeometric(1.001, 1.002),
        lambda: fix.Veto(2.0),
        lambda: fix.OffPolicyMask(0.0),
        lambda: kl.LossKL(0.0),
        lambda: kl.LossKL(-0.1),
        lambda: kl.RewardKL(float("nan")),
    ],
)
def test_settings_that_mean_nothing_do_not_construct(make):
    with pytest.raises(KeelError, match="expected"):
        make()


def test_a_surrogate_of_your_own_is_a_call():
    class Squared(Surrogate):
        def __call__(self, view):
            return -view.advantage * view.importance.exp() ** 2

    objective = Objective(surrogate=Squared())
    assert tokens(objective.surrogate(view(A, LOG))) == pytest.approx([-a * r * r for a, r in PAIRS])
    assert not objective.surrogate.bound(view(A, LOG)).any()


# ── log-ratios ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_log_ratios():
    x = torch.tensor([[0.1, 0.2, 0.6], [0.5, -0.1, 0.0]])
    table = {
        log_ratios.token: [0.1, 0.2, 0.6, 0.5, -0.1],
        log_ratios.sequence: [0.9, 0.9, 0.9, 0.4, 0.4],
        log_ratios.geometric_mean: [0.3, 0.3, 0.3, 0.2, 0.2],
        log_ratios.prefix: [0.1, 0.3, 0.9, 0.5, 0.4],
    }
    for over, expected in table.items():
        assert tokens(over(x, MASK)) == pytest.approx(expected)


def test_a_tool_token_in_the_middle_is_no_token():
    """F35, F42: one token of four was not sampled; means, sums and prefixes pass over it."""
    mask = torch.tensor([[True, False, True, True]])
    x = torch.tensor([[0.3, 0.0, 0.3, 0.6]])
    assert tokens(log_ratios.geometric_mean(x, mask), mask) == pytest.approx([0.4] * 3)
    assert tokens(log_ratios.prefix(x, mask), mask) == pytest.approx([0.3, 0.6, 1.2])


def test_own_gradient_is_gspo_token():
    """Under a per-completion mean it is the gradient of s = (π/π_old)^(1/|y|) itself."""
    logp = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    x = torch.where(MASK, logp, 0.0)
    s = log_ratios.geometric_mean(x, MASK)
    count = MASK.sum(1, keepdim=True)

    def slope(value):
        return torch.autograd.grad((torch.where(MASK, value.exp(), 0.0) / count).sum(), logp, retain_graph=True)[0]

    torch.testing.assert_close(slope(log_ratios.own_gradient(s, x)), slope(s))


# ── corrections ────────────────────────────────────────────────────────────────────────────────────────────────────

GAP = [[math.log(3.0), math.log(0.4), 0.0], [math.log(1.1), math.log(1.2)]]


@pytest.mark.parametrize(
    "correction, expected",
    [
        (fix.TruncateToken(2.0), [2.0, 0.4, 1.0, 1.1, 1.2]),
        (fix.TruncateToken(float("inf")), [3.0, 0.4, 1.0, 1.1, 1.2]),
        (fix.MaskToken(0.5, 5.0), [3.0, 0.0, 1.0, 1.1, 1.2]),
        (fix.MaskToken(0.5, 2.0), [0.0, 0.0, 1.0, 1.1, 1.2]),
        (fix.TruncateSequence(1.25), [1.2, 1.2, 1.2, 1.25, 1.25]),  # products 1.2 and 1.32
        (fix.MaskSequence(0.0, 1.25), [1.2, 1.2, 1.2, 0.0, 0.0]),
        (fix.RejectGeometric(0.9, 1.1), [1.0, 1.0, 1.0, 0.0, 0.0]),  # 1.2^(1/3) = 1.063, 1.32^(1/2) = 1.149
        (fix.Veto(0.5), [0.0, 0.0, 0.0, 1.0, 1.0]),
        (fix.Veto(1e-4), [1.0] * 5),
    ],
)
def test_corrections(correction, expected):
    assert tokens(correction(view(A, LOG, GAP))) == pytest.approx(expected)


def test_off_policy_mask():
    """Only A < 0, and only where the mean of log μ − log π (or log π_old − log π) exceeds δ."""
    stale = [[-0.5] * 3, [-0.3, -0.1]]  # log π − log π_old: mean −.2 for the second completion
    gap = [[0.0] * 3, [0.15, 0.15]]  # log π_old − log μ: mean .15, so that log μ − log π is only .05
    at = view(A, stale, gap)
    assert tokens(fix.OffPolicyMask(0.1, against_sampler=False)(at)) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert tokens(fix.OffPolicyMask(0.1, against_sampler=True)(at)) == [1.0] * 5
    assert tokens(fix.OffPolicyMask(0.04, against_sampler=True)(at)) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_corrections_multiply_and_carry_no_gradient():
    at = view(A, LOG, GAP)
    both = fix.weight((fix.TruncateToken(2.0), fix.Veto(0.5)), at)
    assert tokens(both) == pytest.approx([0.0, 0.0, 0.0, 1.1, 1.2])
    assert not both.requires_grad


# ── KL ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

D = [[0.5, -0.2, 0.1], [0.3, 0.4]]
FLAT = [d for row in D for d in row]


def test_estimators():
    d = torch.tensor([0.5, -2.0, 0.0, 1e-9], dtype=torch.float64)
    assert kl.k1(d).tolist() == d.tolist()
    assert kl.k2(d).tolist() == pytest.approx([0.125, 2.0, 0.0, 5e-19])
    assert kl.k3(d).tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(2) - 3, 0.0, 5e-19], abs=1e-17)
    assert kl.k3_clamped(torch.tensor([-9.0])).item() == 10.0


def test_loss_kl_levels():
    at = view(A, LOG, ref=D)
    k3 = [math.exp(-d) - 1 + d for d in FLAT]
    assert tokens(kl.LossKL(0.1)(at)) == pytest.approx([0.1 * k for k in k3])
    # sequence: d sums to .4 over three tokens and to .7 over two; k2 is .08 and .245
    spread = tokens(kl.LossKL(1.0, kl.k2, kl.per_sequence)(at))
    assert spread == pytest.approx([0.08 / 3] * 3 + [0.245 / 2] * 2)
    prefixes = tokens(kl.LossKL(1.0, kl.k1, kl.per_prefix)(at))
    assert prefixes == pytest.approx([0.5, 0.3, 0.4, 0.3, 0.7])


def test_loss_kl_weighted_by_rho():
    gap = [[0.1, 0.2, -0.3], [0.4, 0.5]]
    at = view(A, LOG, gap, ref=D)
    rho = [r * math.exp(g) for (_, r), g in zip(PAIRS, [g for row in gap for g in row], strict=True)]
    got = tokens(kl.LossKL(1.0, kl.k3, ratio=log_ratios.token)(at))
    assert got == pytest.approx([w * (math.exp(-d) - 1 + d) for w, d in zip(rho, FLAT, strict=True)])


def test_reward_kl_whole_and_to_go():
    d = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, 7.0]])
    penalty, whole = kl.RewardKL(2.0).penalty(d, MASK)
    assert whole.tolist() == pytest.approx([0.8, 1.4])
    assert tokens(penalty) == pytest.approx([0.8, 0.8, 0.8, 1.4, 1.4])
    penalty, _ = kl.RewardKL(2.0, to_go=True).penalty(d, MASK)
    # from each token on: .4, −.1, .1 and .7, .4, times 2
    assert tokens(penalty) == pytest.approx([0.8, -0.2, 0.2, 1.4, 0.8])


def test_to_go_passes_over_a_tool_token():
    """F35: a masked token in the middle is neither an end nor a payment."""
    mask = torch.tensor([[True, False, True]])
    penalty, whole = kl.RewardKL(1.0, to_go=True).penalty(torch.tensor([[1.0, float("nan"), 3.0]]), mask)
    assert tokens(penalty, mask) == [4.0, 3.0] and whole.tolist() == [4.0]
