"""Seeds, checksums, and a contract that healthy completions keep."""

from __future__ import annotations

import time

import pytest
import torch

from keel.errors import KeelError
from keel.rollout.engine import Seed, check_arrival, check_completions, checksum, fingerprints, tensor_hash
from keel.types import Prompt, Sampling

PROMPTS = [Prompt("a", "1+1", "2", (4, 5)), Prompt("b", "2+2", "4", (6,))]
CAP4 = Sampling(max_completion_tokens=4)


def test_a_seed_row_depends_on_each_of_its_four_parts():
    rows = {seed.row(prompt, sample) for seed in (Seed(0, 0), Seed(0, 1), Seed(1, 0)) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(rows) == 12
    assert Seed(3, 7).row("a", 2)[:2] == (3, 7) and Seed(3, 7).row("a", 2)[3] == 2


def test_a_seed_row_is_the_same_in_every_process():
    assert Seed(0, 0).row("prompt-1", 0)[2] == 9205575635437560729


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (2**15 * 8 + 3,)])
def test_any_changed_element_changes_the_hash(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    places = {0, tensor.numel() // 2, tensor.numel() - 1}
    before = tensor_hash(tensor)
    for place in places:
        changed = tensor.clone()
        changed.view(-1)[place] = 0
        assert tensor_hash(changed) != before
    assert tensor_hash(tensor.clone()) == before


def test_two_flipped_signs_do_not_cancel():
    tensor = torch.ones(100)
    flipped = tensor.clone()
    flipped[[1, 3]] = -1
    assert tensor_hash(flipped) != tensor_hash(tensor)


def test_swapped_elements_shape_and_dtype_change_the_hash():
    tensor = torch.arange(100_000, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[10, 90_000]] = swapped[[90_000, 10]]
    others = [swapped, tensor.view(1000, 100), tensor.view(torch.int32), torch.cat((tensor, torch.zeros(1)))]
    assert len({tensor_hash(t) for t in (tensor, *others)}) == 5


def test_the_last_bit_of_a_weight_counts():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    nudged = tensor.clone()
    nudged[500] = torch.nextafter(nudged[500], torch.tensor(torch.inf))
    assert tensor_hash(nudged) != tensor_hash(tensor)


def test_a_view_hashes_as_its_copy():
    tensor = torch.randn(64, 65, generator=torch.Generator().manual_seed(0))
    assert tensor_hash(tensor.T) == tensor_hash(tensor.T.contiguous())
    assert tensor_hash(tensor[:, 1:]) == tensor_hash(tensor[:, 1:].clone())
    assert tensor_hash(tensor[0, ::2]) == tensor_hash(tensor[0, ::2].clone())


def test_a_checksum_ignores_the_order_of_names_but_not_the_names():
    a, b = torch.ones(3), torch.zeros(3)
    assert checksum({"a": a, "b": b}) == checksum({"b": b, "a": a})
    assert checksum({"a": a, "b": b}) != checksum({"a": b, "b": a})
    assert checksum({"a": a}) != checksum({"a": a, "b": b})


def test_a_tied_head_is_read_once_and_named_twice(tiny_policy):
    prints = fingerprints(tiny_policy.weights())
    assert prints["lm_head.weight"] == prints["model.embed_tokens.weight"]


def test_a_hundred_megabytes_take_a_fraction_of_a_second():
    tensor = torch.ones(25_000_000)
    start = time.perf_counter()
    tensor_hash(tensor)
    assert time.perf_counter() - start < 0.5


def test_equal_weights_arrive(tiny_policy, make_policy):
    check_arrival(tiny_policy.weights(), make_policy().weights(), 1)


def test_healthy_completions_pass(make_completion):
    rows = [
        make_completion([5, 1], "a", 0),
        make_completion([5, 0, 0, 9], "a", 1),  # a sampled pad token is a token like any other
        make_completion([1], "b", 0, logp=0.0),
        make_completion([], "b", 1, finish="error", error="server gone"),
    ]
    check_completions(PROMPTS, rows, 2, CAP4, end_ids={1}, vocab_size=10, version=0)


def test_a_tool_turn_may_hold_anything(make_completion):
    row = make_completion(
        [5, 1, 8, 1], "a", finish="length", sampled=torch.tensor([True, True, False, False]),
        logp_rollout=torch.tensor([-1.0, -1.0, torch.nan, torch.nan]),
    )  # fmt: skip
    check_completions(PROMPTS[:1], [row], 1, CAP4, end_ids={1}, vocab_size=10)


def test_kept_sets_are_asked_for_only_where_they_are_replayed(make_completion):
    truncated = Sampling(top_p=0.9, max_completion_tokens=4)
    bare = [make_completion([5, 1], "a")]
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, 5] = kept[1, 1] = True
    check_completions(PROMPTS[:1], bare, 1, truncated, end_ids={1}, vocab_size=10, replay=False)
    whole = [make_completion([5, 1], "a", kept=kept)]
    check_completions(PROMPTS[:1], whole, 1, truncated, end_ids={1}, vocab_size=10)
    with pytest.raises(KeelError, match="does not say which tokens were kept"):
        check_completions(PROMPTS[:1], bare, 1, truncated, end_ids={1}, vocab_size=10)


def test_the_check_is_cheap(make_completion):
    cap = Sampling(max_completion_tokens=40)
    prompts = [Prompt(str(i), "", "") for i in range(64)]
    rows = [make_completion([5] * 39 + [1], p.id, s) for p in prompts for s in range(8)]
    start = time.perf_counter()
    check_completions(prompts, rows, 8, cap, end_ids={1}, vocab_size=10, version=0)
    assert time.perf_counter() - start < 0.25
