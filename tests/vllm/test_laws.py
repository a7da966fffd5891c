"""The laws of an engine, for vLLM: exact log-probabilities, a seed a sample, every end ends, no old weight and no old cache."""

from __future__ import annotations

import time

import pytest
import torch

from keel.errors import KeelError
from keel.rollout.engine import Seed, check_completions
from keel.rollout.vllm_parts import sampling_fields
from keel.training.batch import batch_from_groups
from keel.types import Group, Prompt, Sampling, Score

GROUP, SEED = 4, Seed(run=3, step=7)


def prompts(policy, count=4):
    asked = [Prompt(f"p{i}", f"{3 + i} + {11 * i} = ?", "") for i in range(count)]
    return [policy.template.render(prompt, policy.tokenizer) for prompt in asked]


def long_prompts(policy, count=2):
    """Longer than a block of the prefix cache, so that a second sample goes on from cached keys and values."""
    draw = torch.Generator().manual_seed(1)
    rows = policy.base.get_output_embeddings().weight.shape[0]
    return [Prompt(f"long{i}", "", "", tuple(torch.randint(0, rows, (180,), generator=draw).tolist())) for i in range(count)]


def gap(policy, asked, completions, temperature):
    """|log-probability of the engine − of the policy|, over all tokens."""
    rows = [completions[i : i + GROUP] for i in range(0, len(completions), GROUP)]
    batch = batch_from_groups([Group(p, tuple(r), (Score(1.0),) * GROUP) for p, r in zip(asked, rows, strict=True)])
    with torch.no_grad():
        return (policy.logp(batch, temperature=temperature).logp - batch.logp_rollout)[batch.mask].abs()


def nudge(policy):
    """Other weights: every one grows by a part in fifty."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.mul_(1.02)


def same(a, b):
    return torch.equal(a.token_ids, b.token_ids) and a.finish == b.finish


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.3])
@pytest.mark.parametrize("make", [prompts, long_prompts])
def test_log_probabilities_are_those_of_the_distribution_sampled_from(engine, measured, temperature, make):
    policy, sampling = engine.policy, Sampling(temperature=temperature, max_completion_tokens=24)
    asked = make(policy)
    completions = engine.generate(asked, sampling, SEED, GROUP)
    vocab = policy.base.get_output_embeddings().weight.shape[0]
    check_completions(asked, completions, GROUP, sampling, end_ids=policy.end_ids, vocab_size=vocab, version=0)
    found = gap(policy, asked, completions, temperature)
    told = f"gap max {found.max():.1e}, mean {found.mean():.1e} nats, {len(found)} tokens"
    measured(f"{policy.name}, T {temperature}, {make.__name__}: {told}")
    assert found.max() < 1e-3


def test_greedy_takes_the_likeliest_token_for_certain(engine):
    sampling = Sampling(temperature=0.0, max_completion_tokens=8)
    a, b = (engine.generate(prompts(engine.policy), sampling, Seed(0, step), 1) for step in (0, 1))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert all(bool((c.logp_rollout == 0).all()) for c in a)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(engine):
    sampling = Sampling(max_completion_tokens=12)
    asked = prompts(engine.policy)
    together, again, other = (engine.generate(asked, sampling, seed, GROUP) for seed in (SEED, SEED, Seed(3, 8)))
    alone = engine.generate(asked[2:3], sampling, SEED, GROUP)
    assert all(same(a, b) for a, b in zip(together, again, strict=True))
    assert sum(same(a, b) for a, b in zip(together, other, strict=True)) <= len(together) // 4
    assert sum(same(a, b) for a, b in zip(alone, together[2 * GROUP : 3 * GROUP], strict=True)) >= GROUP - 1  # a draw on a boundary
    assert len({tuple(c.token_ids.tolist()) for c in together[:GROUP]}) > 1


def test_every_end_token_ends_and_is_kept(engine):
    policy, own = engine.policy, engine.policy.end_ids
    likely = engine.generate(prompts(policy), Sampling(max_completion_tokens=6), SEED, GROUP)
    policy.end_ids = own | set(torch.cat([c.token_ids[2:3] for c in likely]).tolist())
    try:
        completions = engine.generate(prompts(policy), Sampling(max_completion_tokens=24), SEED, GROUP)
        ends = {int(c.token_ids[-1]) for c in completions if c.finish == "stop"}
        assert ends & (policy.end_ids - own)
        assert not any(set(c.token_ids[:-1].tolist()) & policy.end_ids for c in completions)
    finally:
        policy.end_ids = own


def test_no_weight_and_no_cache_of_an_older_version_survives(engine, measured):
    policy, sampling = engine.policy, Sampling(temperature=0.8, max_completion_tokens=8)
    asked = long_prompts(policy)
    engine.generate(asked, sampling, SEED, GROUP)
    nudge(policy)
    assert gap(policy, asked, engine.generate(asked, sampling, SEED, GROUP), 0.8).max() > 1e-2  # in place: it was not told
    begin = time.perf_counter()
    engine.load(policy.weights(), 5)
    seconds = time.perf_counter() - begin
    completions = engine.generate(asked, sampling, SEED, GROUP)
    assert gap(policy, asked, completions, 0.8).max() < 1e-3
    assert all(bool((c.versions == 5).all()) for c in completions)
    measured(f"{policy.name}: weight sync with its checks {seconds:.2f} s; tensors not read back: {engine.unread or 'none'}")
    assert engine.unread == []


def test_throughput_is_told(engine, measured):
    asked = prompts(engine.policy, 16)
    begin = time.perf_counter()
    completions = engine.generate(asked, Sampling(max_completion_tokens=32), SEED, GROUP)
    seconds, tokens = time.perf_counter() - begin, sum(len(c.token_ids) for c in completions)
    told = f"{tokens} tokens of {len(completions)} completions in {seconds:.2f} s, {tokens / seconds:.0f} a second"
    measured(f"{engine.policy.name}: {told}")
    assert tokens > len(completions)


def test_a_sleeping_engine_wakes_by_load(engine):
    engine.sleep()
    with pytest.raises(KeelError, match="sleeps since version"):
        engine.generate(prompts(engine.policy), Sampling(), SEED, 1)
    engine.load(engine.policy.weights(), 0)
    assert len(engine.generate(prompts(engine.policy), Sampling(max_completion_tokens=4), SEED, 1)) == 4


def test_what_it_cannot_do_is_refused(engine):
    with pytest.raises(KeelError, match="no kept sets"):
        engine.generate(prompts(engine.policy), Sampling(top_p=0.9), SEED, 1)
    with pytest.raises(KeelError, match=f"the context of this engine is {engine.context}"):
        engine.generate([Prompt("long", "", "", (5,) * engine.context)], Sampling(max_completion_tokens=1), SEED, 1)
    with pytest.raises(KeelError, match="has no token ids"):
        engine.generate([Prompt("bare", "", "")], Sampling(max_completion_tokens=1), SEED, 1)


def test_no_field_of_vllm_that_shapes_sampling_is_left_out():
    import vllm

    known = {  # of the rest: how outputs are told, or more stops and structure that are off unless asked for
        "prompt_logprob_start", "logprob_token_ids", "flat_logprobs", "skip_special_tokens", "spaces_between_special_tokens",
        "include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length",
        "structured_outputs", "extra_args", "routed_experts_prompt_start", "skip_reading_prefix_cache",
        "repetition_detection", "thinking_token_budget", "truncate_prompt_tokens", "prompt_logprob_token_ids",
        "trace_decode_token_ids",
    }  # fmt: skip
    fields = {name for name in vllm.SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields - known - set(sampling_fields(Sampling(), {1}, 0)) == set()
