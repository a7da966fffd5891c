"""Groups become batches: nothing lost, nothing shifted, failures left out."""

import pytest
import torch

from keel.training.batch import batch_from_groups, micro_batches
from keel.types import Completion, Group, Prompt, Score


def completion(ids, *, sample=0, finish="stop", sampled=None, prompt_id="p"):
    n = len(ids)
    return Completion(
        prompt_id=prompt_id, sample=sample, token_ids=torch.tensor(ids, dtype=torch.long), logp_rollout=-torch.arange(1.0, n + 1),
        finish=finish, text="", versions=torch.zeros(n, dtype=torch.long),
        sampled=torch.ones(n, dtype=torch.bool) if sampled is None else torch.tensor(sampled), error="x" * (finish == "error"),
    )  # fmt: skip


def prompt(id, length):
    return Prompt(id=id, text="", answer="", token_ids=tuple(range(10, 10 + length)))


def test_rows_stand_where_they_belong():
    groups = [
        Group(prompt("a", 2), (completion([1, 2, 3]), completion([4], sample=1, finish="length")), (Score(1.0, True), Score(0.0))),
        Group(prompt("b", 3), (completion([5, 6]),), (Score(0.5),)),
    ]
    batch = batch_from_groups(groups)
    assert batch.tokens.tolist() == [[10, 11, 1, 2, 3], [10, 11, 4, 0, 0], [10, 11, 12, 5, 6]]
    assert batch.prompt_len.tolist() == [2, 2, 3]
    assert batch.completion_len.tolist() == [3, 1, 2]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert batch.logp_rollout.tolist() == [[-1, -2, -3], [-1, 0, 0], [-1, -2, 0]]
    assert batch.group.tolist() == [0, 0, 1]
    assert batch.reward.tolist() == [1.0, 0.0, 0.5]
    assert batch.correct.tolist() == [True, False, False]
    assert batch.truncated.tolist() == [False, True, False]


def test_environment_tokens_are_not_trained():
    group = Group(prompt("a", 1), (completion([1, 2, 3], sampled=[True, False, True]),), (Score(1.0),))
    assert batch_from_groups([group]).mask.tolist() == [[True, False, True]]


def test_unscorable_is_kept_apart_and_failures_are_left_out():
    rows = (completion([1, 2]), completion([3], sample=1), completion([], sample=2, finish="error"))
    batch = batch_from_groups(
        [Group(prompt("a", 1), rows, (Score(None, reason="judge"), Score(1.0), Score(None, reason="engine")))]
    )
    assert len(batch) == 2
    assert batch.scorable.tolist() == [False, True]
    assert torch.isnan(batch.reward[0])
    assert batch.mask.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("limit", [1, 5, 9, 14, 1000, None])
def test_micro_batches_are_a_partition_in_order_and_within_the_limit(limit):
    groups = [Group(prompt(str(i), 2), (completion(list(range(1, 2 + i))),), (Score(1.0),)) for i in range(6)]
    batch = batch_from_groups(groups)
    cuts = micro_batches(batch, limit)
    assert torch.cat(cuts).tolist() == list(range(6))
    tokens = batch.prompt_len + batch.completion_len
    for rows in cuts:
        assert len(rows) > 0
        assert limit is None or len(rows) == 1 or int(tokens[rows].sum()) <= limit
