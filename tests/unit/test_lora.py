"""LoRA: only adapters train, engines get the merged weights, and the reference is honest."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from keel.errors import KeelError
from keel.models.lora import LoraConfig, merged_weights, plain_copy, plain_shapes, reference, started_from_zero, wrap
from keel.models.policy import Policy
from keel.rollout.engine import Seed
from keel.rollout.scripted import ScriptedEngine
from keel.types import Prompt, Sampling

KINDS = ["qwen3", "llama", "qwen3_moe", "gpt2"]
IDS = torch.arange(20, 36)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def stir(model, seed=0):
    """Move every adapter away from zero, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(make_policy, kind):
    model = make_policy(kind).model
    before = logits(model)
    assert torch.equal(logits(wrap(model, LoraConfig(rank=4))), before)


def test_only_adapters_train(tiny_policy):
    model = wrap(tiny_policy.model, LoraConfig(rank=4))
    policy = Policy(model, tiny_policy.tokenizer, tiny_policy.template, tiny_policy.end_ids, "lora")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model(input_ids=IDS).logits.square().mean().backward()
    assert policy.parameters() and all("lora_" in name for name in policy.parameters())
    assert all(p.grad is not None for p in policy.parameters().values())
    torch.optim.SGD(policy.parameters().values(), lr=1.0).step()
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    assert not model.training


def test_rank_and_layers_are_as_asked(tiny_policy):
    model = wrap(tiny_policy.model, LoraConfig(rank=3, targets=("q_proj", "down_proj")))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    assert {name.split(".")[-4] for name in shapes} == {"q_proj", "down_proj"} and len(shapes) == 2 * 2 * 2
    assert all(3 in shape for shape in shapes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_compute_what_the_adapters_compute(make_policy, kind):
    plain, policy = make_policy(kind), make_policy(kind)
    model = wrap(policy.model, LoraConfig(rank=4, alpha=12.0))
    stir(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = merged_weights(model)
    assert merged.keys() == plain.model.state_dict().keys()
    plain.model.load_state_dict(merged)
    torch.testing.assert_close(logits(plain.model), logits(model), rtol=0, atol=1e-5)
    assert (logits(plain.model) - logits(make_policy(kind).model)).abs().max() > 1e-3  # the adapters did something
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_shapes_are_those_of_the_model_without_adapters(make_policy, kind):
    policy = make_policy(kind)
    before = {name: tensor.shape for name, tensor in policy.model.state_dict().items()}
    assert plain_shapes(policy.base) == before
    wrapped = wrap(policy.model, LoraConfig(rank=4))
    assert plain_shapes(wrapped.get_base_model()) == before
    assert {name: tensor.shape for name, tensor in merged_weights(wrapped).items()} == before


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_compact_decoder_sees_the_adapters(make_policy, kind):
    plain = make_policy(kind)
    model = wrap(plain.model, LoraConfig(rank=4))
    stir(model)
    policy = Policy(model, plain.tokenizer, plain.template, plain.end_ids, "lora")
    engine = ScriptedEngine(policy, lambda prompt, sample: "17+25=42")
    prompt = Prompt("p", "1+2", "3", tuple(IDS[0].tolist()))
    logp = engine.generate([prompt], Sampling(), Seed(0, 0), 1)[0].logp_rollout
    ids = torch.tensor([[*prompt.token_ids, *engine._ids(prompt, 0)]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    expected = whole[IDS.shape[1] - 1 : -1].gather(1, ids[0, IDS.shape[1] :, None])[:, 0]
    assert policy.decoder is not None
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)


def test_merging_is_w_plus_scale_b_a(tiny_policy):
    weight = tiny_policy.model.model.layers[0].self_attn.q_proj.weight.clone()
    model = wrap(tiny_policy.model, LoraConfig(rank=2, alpha=6.0))
    stir(model)
    layer = tiny_policy.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged_weights(model)[name], weight + 3.0 * b @ a)


def test_weights_without_an_adapter_are_views(tiny_policy):
    model = wrap(tiny_policy.model, LoraConfig(targets=("q_proj",)))
    name = "model.embed_tokens.weight"
    assert merged_weights(model)[name].data_ptr() == tiny_policy.base.model.embed_tokens.weight.data_ptr()


def test_the_reference_of_adapters_from_zero_is_the_model_without_them(tiny_policy):
    before = logits(tiny_policy.model)
    model = wrap(tiny_policy.model, LoraConfig(rank=4))
    stir(model)
    moved = logits(model)
    assert started_from_zero(model) and not torch.equal(moved, before)
    with reference(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), moved)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_trained_adapter_is_no_zero_start(tiny_policy, make_policy, tmp_path):
    trained = wrap(tiny_policy.model, LoraConfig(rank=4))
    stir(trained)
    trained.save_pretrained(tmp_path)
    model = wrap(make_policy().model, LoraConfig(adapter=str(tmp_path)))
    torch.testing.assert_close(logits(model), logits(trained))
    assert not started_from_zero(model)
    with pytest.raises(KeelError, match="did not start from zero"), reference(model):
        pass
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_keel_did_not_wrap_is_not_trusted(tiny_policy):
    import peft

    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    assert not started_from_zero(peft.get_peft_model(tiny_policy.model, config))


def test_the_adapters_seed_fixes_them_and_the_global_state_stays(make_policy):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    models = [wrap(make_policy().model, LoraConfig(rank=4), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    a = [dict(m.named_parameters())[_FIRST] for m in models]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])
    assert a[0].abs().max() <= 1 / 32**0.5


_FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_plain_copy_is_frozen_and_stays_behind(tiny_policy, with_lora):
    model = wrap(tiny_policy.model, LoraConfig(rank=4)) if with_lora else tiny_policy.model
    if with_lora:
        stir(model)
    now = logits(model)
    copy = plain_copy(model)
    assert not any("lora_" in name for name in copy.state_dict())
    assert not any(p.requires_grad for p in copy.parameters())
    if with_lora:
        stir(model, 1)
    else:
        model.lm_head.weight.data += 1
    torch.testing.assert_close(logits(copy), now, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), now)


def test_an_adapter_of_another_kind_is_refused(tiny_policy):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_policy.model, config)
    with pytest.raises(KeelError, match="of another kind"):
        merged_weights(model)


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(targets="")])
def test_an_adapter_of_nothing_is_refused(wrong):
    with pytest.raises(KeelError, match="adapts nothing"):
        LoraConfig(**wrong)


def test_unknown_layers_are_refused_with_the_known_ones(tiny_policy):
    with pytest.raises(KeelError, match="linear layers are down_proj, gate_proj.*q_proj"):
        wrap(tiny_policy.model, LoraConfig(targets=("query",)))


def test_a_missing_or_corrupt_adapter_is_refused(tiny_policy, tmp_path):
    with pytest.raises(KeelError, match="holds no adapter_config.json"):
        wrap(tiny_policy.model, LoraConfig(adapter=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(KeelError, match="cannot be put on this model"):
        wrap(tiny_policy.model, LoraConfig(adapter=str(tmp_path)))


def test_without_peft_the_error_says_how_to_get_it(tiny_policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(KeelError, match=r"pip install 'keel-rl\[lora\]'"):
        wrap(tiny_policy.model, LoraConfig())
