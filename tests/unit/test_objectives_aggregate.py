"""Aggregations against loops, with denominators of the whole step."""

from __future__ import annotations

import math

import pytest
import torch

from keel.objectives import aggregate as agg
from keel.objectives.advantages import centred
from keel.objectives.corrections import MaskToken
from keel.objectives.objective import Objective
from keel.objectives.signals import Prepared
from keel.types import Batch

LENGTHS = [2, 2, 4, 1, 3]
GROUP = [0, 0, 1, 1, 2]
SIGN = [1.0, -1.0, -1.0, 1.0, 0.0]


def prepared() -> Prepared:
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    advantage = torch.where(mask, torch.tensor(SIGN)[:, None], 0.0)
    return Prepared(advantage.double(), mask, torch.tensor(GROUP))


def losses() -> torch.Tensor:
    loss = torch.arange(20, dtype=torch.float64).reshape(5, 4) ** 1.5
    return torch.where(prepared().mask, loss, float("nan"))


ROWS = [losses()[i, :n].tolist() for i, n in enumerate(LENGTHS)]


def mean(values):
    return sum(values) / len(values)


def of_group(g):
    return [row for row, group in zip(ROWS, GROUP, strict=True) if group == g]


def flat(rows):
    return [x for row in rows for x in row]


EXPECTED = {
    agg.token_mean: mean(flat(ROWS)),
    agg.group_token_mean: mean([mean(flat(of_group(g))) for g in range(3)]),
    agg.sequence_mean: mean([mean(row) for row in ROWS]),
    agg.prompt_mean: mean([mean([mean(row) for row in of_group(g)]) for g in range(3)]),
    agg.constant_length_mean: mean([sum(row) / 10 for row in ROWS]),
    # two completions on each side: half and half
    agg.balanced_mean: 0.5 * mean(flat([ROWS[0], ROWS[3]])) + 0.5 * mean(flat([ROWS[1], ROWS[2]])),
}


@pytest.mark.parametrize("aggregate", EXPECTED, ids=lambda f: f.__name__)
def test_against_loops(aggregate):
    counts = agg.count(prepared(), 10)
    assert aggregate(losses(), prepared(), counts).item() == pytest.approx(EXPECTED[aggregate])


def test_counts():
    counts = agg.count(prepared(), 10)
    assert (counts.tokens, counts.completions, counts.prompts, counts.max_tokens) == (12, 5, 3, 10)
    assert (counts.positive_tokens, counts.negative_tokens) == (3, 6)
    assert (counts.positive_completions, counts.negative_completions) == (2, 2)
    assert counts.group_tokens.tolist() == [4, 5, 3]
    assert counts.group_completions.tolist() == [2, 2, 1]


def test_counts_of_a_step_that_holds_some_groups_only():
    """Group ids stay those of the batch; groups that are not in the step count nothing."""
    counts = agg.count(prepared().rows(torch.tensor([2, 3])), 10)
    assert counts.group_tokens.tolist() == [0, 5]
    assert (counts.tokens, counts.prompts) == (5, 1)


def test_the_micro_batch_does_not_count_itself():
    """F01: lengths 2, 2, 100, 100 with losses 1, 1, 0, 0: 4/204 = .0196 however it is cut, never .5."""
    length = torch.tensor([2, 2, 100, 100])
    mask = torch.arange(100) < length[:, None]
    whole = Prepared(torch.zeros(4, 100), mask, torch.tensor([0, 0, 1, 1]))
    loss = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None].expand(4, 100)
    counts = agg.count(whole, 100)
    for cut in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3, 0], [1, 2]]):
        parts = [torch.tensor(rows) for rows in cut]
        total = sum(agg.token_mean(loss[rows], whole.rows(rows), counts).item() for rows in parts)
        assert total == pytest.approx(0.0196, abs=5e-5)


def two_by_three(gap: torch.Tensor) -> Batch:
    """A right and a wrong completion of one prompt, three tokens each."""
    return Batch(
        tokens=torch.zeros(2, 4, dtype=torch.long),
        prompt_len=torch.ones(2, dtype=torch.long),
        completion_len=torch.full((2,), 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
        logp_rollout=-1.0 - gap,
        group=torch.zeros(2, dtype=torch.long),
        reward=torch.tensor([1.0, 0.0]),
        scorable=torch.ones(2, dtype=torch.bool),
        correct=torch.tensor([True, False]),
        truncated=torch.zeros(2, dtype=torch.bool),
        versions=torch.zeros(2, 3, dtype=torch.long),
        logp_old=torch.full((2, 3), -1.0),
    )


def gradients(objective: Objective, batch: Batch):
    """Of logp and entropy, and the step's counts."""
    prepared = objective.prepare(batch, 3)
    counts = objective.counts(batch, prepared, 3)
    logp, entropy = batch.logp_old.clone().requires_grad_(), torch.ones(2, 3).requires_grad_()
    objective.loss(logp, entropy, batch, prepared, counts).backward()
    return logp.grad, entropy.grad, counts


def test_a_rejected_token_stays_in_the_denominator_or_leaves_it():
    """Of six tokens one has w = 10: its loss is gone either way; the divisor is 6, or 5 where it leaves."""
    gap = torch.zeros(2, 3)
    gap[0, 1] = math.log(10.0)
    batch = two_by_three(gap)
    for leaves, divisor in ((False, 6), (True, 5)):
        fix = MaskToken(0.5, 5.0, leaves=leaves)
        objective = Objective(advantage=centred, corrections=(fix,), aggregate=agg.token_mean)
        slope, _, counts = gradients(objective, batch)
        assert counts.tokens == divisor
        torch.testing.assert_close(slope, torch.tensor([[-0.5, 0.0, -0.5], [0.5, 0.5, 0.5]]) / divisor)


def test_the_entropy_bonus_raises_entropy():
    """Descent follows +entropy_coef on every trained token: the loss falls by coef · mean entropy."""
    objective = Objective(advantage=centred, aggregate=agg.token_mean, entropy_coef=0.3)
    _, slope, _ = gradients(objective, two_by_three(torch.zeros(2, 3)))
    torch.testing.assert_close(slope, torch.full((2, 3), -0.3 / 6))


def test_balanced_with_one_side_only():
    p = prepared()
    praised = Prepared(p.advantage.abs(), p.mask, p.group)
    counts = agg.count(praised, 10)
    # the fifth completion has A = 0: on no side
    assert agg.balanced_mean(losses(), praised, counts).item() == pytest.approx(mean(flat(ROWS[:4])))
