"""What holds for every objective: each recipe, and each part built into the solid baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keel.diagnostics import measure
from keel.errors import KeelError
from keel.objectives.log_ratios import token
from keel.objectives.parts import PARTS, vary
from keel.objectives.recipes import RECIPES, recipe
from keel.objectives.surrogates import Reinforce
from keel.types import Batch

CAP = 8  # close enough for the longest completions to be punished
CLIPPED = {"surrogate": "clip"}


def _variations() -> dict[str, dict]:
    """The solid baseline with one part changed, for every part there is."""
    paths = {
        "surrogate": {},
        "aggregate": {},
        "corrections": CLIPPED,
        "shaping": {},
        "log_ratio": CLIPPED,
        "reward_kl": {},
        "advantage.baseline": {},
        "advantage.scale": {},
        "loss_kl.estimator": {"loss_kl": "k3"},
        "loss_kl.level": {"loss_kl": "k3"},
        "loss_kl.ratio": {"loss_kl": "k3"},
        "reward_kl.level": {"reward_kl": "k1"},
    }
    listed = ("corrections", "shaping")
    made = {
        f"{path}={name}": {**beside, path: [name] if path in listed else name}
        for path, beside in paths.items()
        for name in PARTS[path.rpartition(".")[2]]
        if name != "none"
    }
    leaving = {
        f"{name}.leaves": {**CLIPPED, "corrections": [name], f"corrections.{name}.leaves": True}
        for name in ("mask_token", "mask_sequence", "reject_geometric", "veto")
    }
    near = {"corrections.reject_geometric.low": 0.9, "corrections.reject_geometric.high": 1.1}
    for name in ("corrections=reject_geometric", "reject_geometric.leaves"):
        (made if name in made else leaving)[name] |= near
    to_go = {"reward_kl": "k1", "reward_kl.to_go": True}
    return {
        **made,
        **leaving,
        "to_go": to_go,
        "to_go.after": {**to_go, "reward_kl.after_normalising": True},
        "whitened to go": {**to_go, "advantage.baseline": "zero", "advantage.scale": "token_whitening"},
        "filter in baseline": {"shaping": ["overlong_filter"], "shaping.overlong_filter.in_baseline": True},
        "entropy": {"entropy_coef": 0.01},
        "sampler's mask": {**CLIPPED, "corrections": ["off_policy_mask"], "corrections.off_policy_mask.delta": 0.01},
    }


OBJECTIVES = {name: found.objective for name, found in RECIPES.items()} | {
    name: vary(recipe("solid").objective, changes) for name, changes in _variations().items()
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def make_batch(seed: int = 0, rows: int = 12, width: int = 7) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Stale and gapped; groups of different size in mixed order, tool tokens, one unscorable, some truncated."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, width, generator=g, dtype=torch.float64)

    length = torch.randint(1, width + 1, (rows,), generator=g)
    length[0] = width
    group = torch.tensor([0, 2, 1, 0, 3, 1, 0, 2, 0, 1, 2, 3])[:rows]
    scorable = torch.arange(rows) != 5
    inside = torch.arange(width) < length[:, None]
    sampled = (torch.rand(rows, width, generator=g) > 0.15) | (torch.arange(width) == 0)
    old = -torch.rand(rows, width, generator=g, dtype=torch.float64) * 2
    logp = old + noise(0.4)
    correct = torch.rand(rows, generator=g) > 0.5
    batch = Batch(
        tokens=torch.zeros(rows, width + 2, dtype=torch.long),
        prompt_len=torch.full((rows,), 2),
        completion_len=length,
        mask=inside & sampled & scorable[:, None],
        logp_rollout=old + noise(0.2),
        group=group,
        reward=torch.where(scorable, correct + noise(0.1)[:, 0], float("nan")),
        scorable=scorable,
        correct=correct,
        truncated=(length == width) & (torch.arange(rows) > 2),
        versions=torch.zeros(rows, width, dtype=torch.long),
        logp_old=old,
        logp_ref=old + noise(0.3),
    )
    return batch, logp, torch.rand(rows, width, generator=g, dtype=torch.float64)


def step(objective, batch, logp, entropy, parts=None, cap=CAP):
    """Loss of the step and its gradients, cut into `parts` (index tensors) after preparing the whole."""
    logp, entropy = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    prepared = objective.prepare(batch, cap)
    counts = objective.counts(batch, prepared, cap)
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts if parts is not None else [torch.arange(len(batch))]:
        share = objective.loss(logp[rows], entropy[rows], batch.rows(rows), prepared.rows(rows), counts)
        share.backward()
        total = total + share.detach()
    none = torch.zeros_like(logp)
    grads = [x.grad if x.grad is not None else none for x in (logp, entropy)]
    return total, *grads


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_objective
def test_it_has_a_gradient_to_speak_of(objective):
    """Without it the equalities below would say nothing."""
    assert any(grad.abs().max() > 1e-4 for grad in step(objective, *make_batch())[1:])


CUTS = {
    "singletons": lambda n: list(torch.arange(n).split(1)),
    "halves": lambda n: list(torch.arange(n).chunk(2)),
    "uneven": lambda n: list(torch.arange(n).split([1, 7, n - 8])),
    "shuffled thirds": lambda n: list(torch.randperm(n, generator=torch.Generator().manual_seed(1)).chunk(3)),
    "two ranks of two": lambda n: [m for rank in (0, 1) for m in torch.arange(rank, n, 2).chunk(2)],
    "four ranks": lambda n: [torch.arange(rank, n, 4) for rank in range(4)],
}


@every_objective
def test_no_cut_is_visible(objective):
    """F01, F02, F03: denominators come from the whole step, so shares of any cut sum to the same loss and gradient."""
    whole = step(objective, *make_batch())
    for cut in CUTS.values():
        for a, b in zip(step(objective, *make_batch(), parts=cut(12)), whole, strict=True):
            close(a, b)


@every_objective
def test_rows_permute_and_groups_are_relabelled(objective):
    """F08: groups are formed by id, so neither the order of rows nor the numbering of groups means anything."""
    batch, logp, entropy = make_batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    relabelled = replace(batch, group=torch.tensor([2, 0, 3, 1])[batch.group]).rows(order)
    loss, *grads = step(objective, batch, logp, entropy)
    permuted, *moved = step(objective, relabelled, logp[order], entropy[order])
    close(permuted, loss)
    for a, b in zip(moved, grads, strict=True):
        close(a, b[order])


@every_objective
def test_padding_is_invisible(objective):
    batch, logp, entropy = make_batch()

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 5), value=value)

    names = ("logp_rollout", "logp_old", "logp_ref")
    wide = replace(
        batch,
        mask=pad(batch.mask, False),
        versions=pad(batch.versions, 0),
        **{name: pad(getattr(batch, name), float("nan")) for name in names},
    )
    loss, *grads = step(objective, batch, logp, entropy)
    padded, *wider = step(objective, wide, pad(logp, float("nan")), pad(entropy, float("inf")))
    close(padded, loss)
    for a, b in zip(wider, grads, strict=True):
        close(a[:, :7], b)
        assert (a[:, 7:] == 0).all()


def _with_junk(batch, logp, entropy, junk):
    """The same step with `junk` wherever nothing is trained."""
    off = ~batch.mask

    def fill(x):
        return torch.where(off, junk, x)

    names = ("logp_rollout", "logp_old", "logp_ref")
    dirty = replace(
        batch,
        reward=torch.where(batch.scorable, batch.reward, junk),
        **{name: fill(getattr(batch, name)) for name in names},
    )
    return dirty, fill(logp), fill(entropy)


def _measured(objective, batch, logp, entropy):
    prepared = objective.prepare(batch, CAP)
    return measure(batch, prepared, logp, entropy, objective, objective.counts(batch, prepared, CAP))


@every_objective
def test_masked_is_absent_to_the_bit(objective):
    """F16, F35: what stands under the mask changes no bit of loss, gradient or metric."""
    clean = _with_junk(*make_batch(), 0.0)
    expected, numbers = step(objective, *clean), _measured(objective, *clean)
    assert all(abs(value) < float("inf") for value in numbers.values())
    for junk in (float("nan"), float("inf"), -float("inf"), 99.0, -1e30):
        dirty = _with_junk(*make_batch(), junk)
        for a, b in zip(step(objective, *dirty), expected, strict=True):
            assert torch.equal(a, b)
        assert _measured(objective, *dirty) == numbers


@every_objective
def test_on_policy_it_is_the_plain_policy_gradient(objective):
    """At r = 1 and without engine gap, any surrogate under any ratio and correction has REINFORCE's gradient."""
    batch, logp, entropy = make_batch()
    batch = replace(batch, logp_rollout=logp, logp_old=logp)
    alike = replace(objective, loss_kl=None, entropy_coef=0.0)
    plain = replace(alike, surrogate=Reinforce(), log_ratio=token, corrections=())
    close(step(alike, batch, logp, entropy)[1], step(plain, batch, logp, entropy)[1])


@every_objective
def test_equal_rewards_teach_nothing(objective):
    """No difference of rewards, no KL, no entropy bonus: the gradient is exactly zero, not a rounding error."""
    batch, logp, entropy = make_batch()
    batch = replace(batch, reward=torch.full_like(batch.reward, 0.1), logp_ref=batch.logp_old)
    objective = replace(objective, loss_kl=None, entropy_coef=0.0)
    gradient = step(objective, batch, logp, entropy, cap=100)[1]  # no completion comes near this cap
    if objective == OBJECTIVES["advantage.baseline=zero"]:
        assert (gradient != 0).any()  # the only choice without any baseline: every reward teaches
    else:
        assert (gradient == 0).all()


@every_objective
def test_an_unscorable_completion_is_absent(objective):
    """F15, F62: whatever its reward and tokens, and whether it is there at all, nothing else changes."""
    batch, logp, entropy = make_batch()
    kept = torch.tensor([row for row in range(12) if row != 5])
    changed = replace(batch, reward=batch.reward.nan_to_num(1e3), mask=batch.mask | ~batch.scorable[:, None])
    loss, *grads = step(objective, batch, logp, entropy)
    for other in (
        step(objective, changed, logp, entropy),
        step(objective, batch.rows(kept), logp[kept], entropy[kept]),
    ):
        close(other[0], loss)
        for a, b in zip(other[1:], grads, strict=True):
            close(a[kept] if len(a) == 12 else a, b[kept])


@every_objective
def test_gradient_flows_through_the_trainer_alone(objective):
    batch, logp, entropy = make_batch()
    fixed = {name: getattr(batch, name).clone().requires_grad_() for name in ("logp_old", "logp_ref", "logp_rollout")}
    step(objective, replace(batch, **fixed), logp, entropy)
    for tensor in fixed.values():
        assert tensor.grad is None or (tensor.grad == 0).all()


@every_objective
def test_nothing_trained_is_zero_and_finite(objective):
    """F21, F31: a step in which every token is masked has loss 0 and gradient 0."""
    batch, logp, entropy = make_batch()
    for nothing in (
        replace(batch, mask=torch.zeros_like(batch.mask)),
        replace(batch, scorable=torch.zeros_like(batch.scorable)),
    ):
        for value in step(objective, nothing, logp, entropy):
            assert (value == 0).all()


@every_objective
def test_single_precision_and_bfloat_rewards_are_finite(objective):
    batch, logp, entropy = make_batch()
    singles = {name: getattr(batch, name).float() for name in ("logp_old", "logp_ref", "logp_rollout")}
    for reward in (batch.reward.float(), batch.reward.bfloat16()):
        loss, grad, _ = step(objective, replace(batch, reward=reward, **singles), logp.float(), entropy.float())
        assert loss.isfinite() and grad.isfinite().all()


BOUNDED = [name for name, o in OBJECTIVES.items() if "=" not in name and type(o.surrogate).__name__ != "Unclipped"]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_ratio_beyond_all_numbers_stays_behind_its_bound(name):
    """exp(800) overflows: past a clip, in a gate, under a cap or at zero advantage it must not become NaN."""
    objective = replace(OBJECTIVES[name], loss_kl=None, reward_kl=None)
    batch, logp, entropy = make_batch()
    far = logp.clone()
    far[0, 0] = 800.0
    for reward in (torch.full_like(batch.reward, 0.5), (torch.arange(12) == 0).double()):  # A = 0, then A > 0
        loss, grad, _ = step(objective, replace(batch, reward=reward), far, entropy, cap=100)
        assert loss.isfinite() and grad.isfinite().all()


@every_objective
def test_needs_are_what_is_needed(objective):
    """Without what it does not name the step still runs; without what it names it refuses."""
    batch, logp, entropy = make_batch()
    names = {"logp_old", "logp_ref"}
    enough = replace(batch, **{name: None for name in names - objective.needs})
    assert step(objective, enough, logp, entropy)[0].isfinite()
    for name in names & objective.needs:
        with pytest.raises(KeelError, match=name):
            objective.prepare(replace(batch, **{name: None}), CAP)


def test_the_laws_have_teeth():
    """A token mean that counts its own micro-batch breaks the first law: 0.0196 becomes 0.5 (F01)."""

    def own_count(loss, prepared, counts):
        return torch.where(prepared.mask, loss, 0.0).sum() / prepared.mask.sum()

    objective = replace(recipe("solid").objective, aggregate=own_count)
    whole = step(objective, *make_batch())[0]
    halves = step(objective, *make_batch(), parts=list(torch.arange(12).chunk(2)))[0]
    assert not torch.isclose(whole, halves)
