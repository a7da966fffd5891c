"""The compact decoder equals transformers, in value and gradient, for every family it claims."""

import dataclasses

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from keel.models.decoder import supports
from keel.models.policy import Policy
from keel.types import Batch

SIZES = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-biased": (LlamaConfig, dict(attention_bias=True, tie_word_embeddings=True)),
    "mistral": (MistralConfig, dict(sliding_window=None)),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, dict(tie_word_embeddings=True)),
    "qwen3_moe": (Qwen3MoeConfig, MOE | dict(norm_topk_prob=True)),
    "qwen3_moe-raw": (Qwen3MoeConfig, MOE | dict(norm_topk_prob=False)),
}


def make_policy(family):
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | extra)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Policy(model=model, tokenizer=None, template=None, end_ids=frozenset({1}), name=family)


def make_batch(rows=18):
    generator = torch.Generator().manual_seed(2)
    prompt_len = torch.tensor([3, 6, 4])[torch.arange(rows) % 3]
    completion_len = torch.randint(1, 8, (rows,), generator=generator)
    prompts = torch.randint(2, 40, (3, 6), generator=generator)
    tokens = torch.randint(2, 5, (rows, int((prompt_len + completion_len).max())), generator=generator)
    for row in range(rows):
        tokens[row, : prompt_len[row]] = prompts[row % 3, : prompt_len[row]]
    mask = torch.arange(int(completion_len.max())) < completion_len[:, None]
    zeros = torch.zeros(mask.shape)
    return Batch(
        tokens=tokens, prompt_len=prompt_len, completion_len=completion_len, mask=mask, logp_rollout=zeros,
        group=torch.arange(rows) % 3, reward=zeros[:, 0], scorable=mask[:, 0], correct=mask[:, 0], truncated=~mask[:, 0],
        versions=zeros.long(),
    )  # fmt: skip


def value_and_gradient(policy, function):
    policy.model.zero_grad()
    seen = function()
    weights = torch.sin(torch.arange(seen.logp.numel(), dtype=torch.float32)).view_as(seen.logp)
    ((seen.logp * weights).sum() + (seen.entropy * weights.flip(0)).sum()).backward()
    return seen, torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family):
    policy, batch = make_policy(family), make_batch()
    assert policy.decoder is not None
    ours, our_grad = value_and_gradient(policy, lambda: policy.logp(batch, temperature=0.7))
    theirs, their_grad = value_and_gradient(policy, lambda: policy._logp_by_transformers(batch, 0.7))
    assert (ours.logp - theirs.logp).abs().max() < 1e-5
    assert (ours.entropy - theirs.entropy).abs().max() < 1e-5
    assert (our_grad - their_grad).abs().max() < 1e-5 * their_grad.abs().max()


def test_full_logits_agree_with_the_measured_linear_head():
    policy, batch = make_policy("qwen3"), make_batch()
    assert policy.head_is_linear
    chunked = policy._logp_by_transformers(batch, 0.7)
    policy.__dict__["head_is_linear"] = False
    full = policy._logp_by_transformers(batch, 0.7)
    assert (chunked.logp - full.logp).abs().max() < 1e-5
    assert (chunked.entropy - full.entropy).abs().max() < 1e-5


def test_only_what_is_computed_exactly_is_claimed():
    assert not supports(MistralConfig(**SIZES, sliding_window=16))
    assert not supports(LlamaConfig(**SIZES | dict(hidden_act="gelu")))
    scaled = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    assert not supports(LlamaConfig(**SIZES, rope_parameters=scaled))
    assert not supports(transformers.GPT2Config())


def test_padding_values_change_no_bit():
    policy, batch = make_policy("qwen3"), make_batch()
    junk = torch.where(torch.arange(batch.tokens.shape[1]) < (batch.prompt_len + batch.completion_len)[:, None], batch.tokens, 39)
    assert torch.equal(policy.logp(batch).logp, policy.logp(dataclasses.replace(batch, tokens=junk)).logp)


def test_another_architecture_runs_through_transformers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    policy = Policy(
        model=transformers.GPT2LMHeadModel(config).eval(), tokenizer=None, template=None, end_ids=frozenset({1}), name="gpt2"
    )
    batch = make_batch()
    assert policy.decoder is None
    together = policy.logp(batch).logp
    for row in range(4):  # a row alone, without anybody's padding (absolute positions would show a shift)
        n = int(batch.prompt_len[row] + batch.completion_len[row])
        logits = policy.model(batch.tokens[row : row + 1, :n]).logits[0].log_softmax(-1)
        expected = logits[range(n - 1), batch.tokens[row, 1:n]][int(batch.prompt_len[row]) - 1 :]
        assert (together[row, : len(expected)] - expected).abs().max() < 1e-5


def test_idle_nodes_for_fast_products_change_nothing(monkeypatch):
    import keel.models.linear as linear

    policy, batch = make_policy("qwen3_moe"), make_batch()
    plain, plain_grad = value_and_gradient(policy, lambda: policy.logp(batch))
    monkeypatch.setattr(linear, "LARGE", 1)
    filled, filled_grad = value_and_gradient(policy, lambda: policy.logp(batch))
    assert (plain.logp - filled.logp).abs().max() < 1e-5
    assert torch.equal(plain.experts, filled.experts)
    assert (plain_grad - filled_grad).abs().max() < 1e-5 * plain_grad.abs().max()
    replayed = policy.logp(dataclasses.replace(batch, experts=filled.experts), replay_experts=True)
    assert (plain.logp - replayed.logp).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 500, 1000, 2900, 100_000])
def test_regular_numbers_of_rows_are_few_and_near(rows):
    from keel.models.linear import regular

    assert rows <= regular(rows) <= max(64, rows * 1.125 + 64)
    assert regular(regular(rows)) == regular(rows)
    assert len({regular(n) for n in range(rows, 2 * rows)}) <= 18
