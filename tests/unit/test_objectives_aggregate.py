"""Aggregations against loops, with denominators of the whole step."""

from __future__ import annotations

import pytest
import torch

from keel.objectives import aggregate as agg
from keel.objectives.signals import Prepared

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


def test_balanced_with_one_side_only():
    p = prepared()
    praised = Prepared(p.advantage.abs(), p.mask, p.group)
    counts = agg.count(praised, 10)
    # the fifth completion has A = 0: on no side
    assert agg.balanced_mean(losses(), praised, counts).item() == pytest.approx(mean(flat(ROWS[:4])))
