"""Rounding to formats, another order of sums, and the settings that make an engine differ on purpose."""

from __future__ import annotations

import pytest
import torch

from keel.config import load_config
from keel.errors import KeelError
from keel.rollout.engine import Seed, checksum
from keel.rollout.engines import engine_of
from keel.rollout.local import LocalEngine
from keel.rollout.numerics import EXACT, Numerics, RouterNoise, chunked_product, round_fp8, round_integer, rounded
from keel.training.batch import batch_from_groups
from keel.types import Group, Prompt, Sampling, Score

SAMPLING = Sampling(max_completion_tokens=12)
GROUP = 6


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def asked() -> list[Prompt]:
    return [Prompt(id=f"p{i}", text="", answer="", token_ids=tuple(range(5, 7 + i))) for i in range(4)]


def gaps(policy, engine, sampling=SAMPLING, temperature=None) -> torch.Tensor:
    """gap of every token that the engine samples."""
    made = engine.generate(asked(), sampling, Seed(1, 2), GROUP)
    rows = [tuple(made[i : i + GROUP]) for i in range(0, len(made), GROUP)]
    batch = batch_from_groups([Group(p, r, (Score(1.0),) * GROUP) for p, r in zip(asked(), rows, strict=True)])
    with torch.no_grad():
        return (policy.logp(batch, temperature=temperature or sampling.temperature).logp - batch.logp_rollout)[batch.mask]


@pytest.fixture
def sharp(make_policy):
    """sharp(kind): a policy whose distributions are spread out enough for gaps to show."""

    def make(kind="qwen3", **changes):
        policy = make_policy(kind, **changes)
        policy.base.get_output_embeddings().weight.data.mul_(8.0)
        return policy

    return make


# ── rounding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_integers_by_hand():
    # 3 bits: integers −3 … 3, scale 6/3 = 2; 2.9/2 = 1.45 → 1, 1.1/2 = .55 → 1
    row = torch.tensor([[6.0, 2.9, 1.1, -6.0, 0.9], [0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[6.0, 2.0, 2.0, -6.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(round_integer(row, 3), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_have_few_values_and_half_a_step_of_error(bits):
    weight = matrix(7, 300)
    got, step = round_integer(weight, bits), weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert all(len(row.unique()) <= 2**bits - 1 for row in got)
    assert bool(((got - weight).abs() <= step / 2 * 1.0001).all())
    assert torch.allclose(round_integer(got, bits), got, rtol=1e-6)  # rounded already


def test_fp8_by_hand():
    # e4m3 has 8 steps an octave: between 256 and 448 (the largest) they are 32 wide; the row's largest becomes 448
    row = torch.tensor([[448.0, 300.0, 270.0, 17.0, -1.06]])
    assert torch.allclose(round_fp8(row), torch.tensor([[448.0, 288.0, 256.0, 16.0, -1.0]]))
    assert torch.allclose(round_fp8(row * 1e-6), round_fp8(row) * 1e-6)  # the scale is the row's own
    assert torch.equal(round_fp8(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_fp8_errs_by_a_sixteenth_at_most():
    weight = matrix(5, 400)
    error = (round_fp8(weight) - weight).abs()
    assert bool((error <= weight.abs() / 16 + weight.abs().amax(-1, keepdim=True) * 2**-18).all())
    assert float((error / weight.abs()).max()) > 0.05


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_short_floats_are_dtypes(name, dtype):
    assert rounded(matrix(2, 3), name).dtype == dtype


def test_experts_are_rounded_by_row():
    weight = matrix(3, 4, 50) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    assert torch.equal(round_integer(weight, 8)[1], round_integer(weight[1], 8))


def test_sums_in_parts_are_the_same_up_to_rounding():
    x, weight, bias = matrix(9, 100), matrix(5, 100), matrix(5)
    whole = x.double() @ weight.double().T + bias
    parts = chunked_product(x, weight, bias)
    assert torch.allclose(parts.double(), whole, atol=1e-4)
    assert not torch.equal(chunked_product(x.bfloat16(), weight.bfloat16()), x.bfloat16() @ weight.bfloat16().T)


def test_the_same_seed_draws_the_same_router_noise():
    noise, zero = RouterNoise(0.5), torch.zeros(1000, 4)
    draws = []
    for key in ((1, 2), (1, 2), (1, 3)):
        noise.seed(*key)
        draws.append(noise(zero))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert 0.45 < float(draws[0].std()) < 0.55


# ── which weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_the_matrices_of_layers_are_rounded_and_nothing_else(make_policy, kind):
    weights = make_policy(kind).weights()
    lowered = Numerics("int8").weights(weights)
    changed = {name for name in weights if not torch.equal(weights[name], lowered[name])}
    assert changed
    for name in weights:
        spared = any(part in name for part in ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "mlp.gate.weight", "bias"))
        assert (name in changed) == (not spared), name


def test_exact_arithmetic_copies_nothing(tiny_policy):
    weights = tiny_policy.weights()
    assert EXACT.weights(weights) is weights


def test_a_tied_head_stays_tied(tiny_policy):
    lowered = Numerics("bf16").weights(tiny_policy.weights())
    assert lowered["lm_head.weight"].data_ptr() == lowered["model.embed_tokens.weight"].data_ptr()
    assert {tensor.dtype for tensor in lowered.values()} == {torch.bfloat16}


# ── engines ───────────────────────────────────────────────────────────────────────────────────────────────────────────

INEXACT = {
    "bf16": Numerics("bf16"),
    "fp16": Numerics("fp16"),
    "fp8": Numerics("fp8"),
    "int8": Numerics("int8"),
    "4 bits": Numerics(weight_bits=4),
    "4 bits in bf16": Numerics("bf16", weight_bits=4),
    "head in bf16": Numerics(head_format="bf16"),
    "head in fp8": Numerics(head_format="fp8"),
    "bf16 with a head in fp32": Numerics("bf16", head_format="fp32"),
    "another order in bf16": Numerics("bf16", order="separate"),
}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("name", INEXACT)
def test_a_format_makes_a_gap_and_a_small_one(sharp, kind, name):
    policy = sharp(kind)
    engine = LocalEngine(policy, numerics=INEXACT[name])
    gap = gaps(policy, engine)
    assert not engine.exact
    assert 1e-4 < float(gap.abs().max()) < 3.0
    assert abs(float(gap.exp().mean()) - 1) < 0.1  # it reports the distribution that it draws from


def test_coarser_is_farther(sharp):
    policy = sharp()
    sizes = [float(gaps(policy, LocalEngine(policy, numerics=Numerics(weight_bits=bits))).square().mean()) for bits in (8, 5, 3)]
    assert sizes[0] * 4 < sizes[1] and sizes[1] * 4 < sizes[2]


def test_a_head_in_fp32_is_closer_than_one_in_bf16(sharp):
    policy = sharp()
    plain, better = (gaps(policy, LocalEngine(policy, numerics=Numerics("bf16", head_format=h))) for h in (None, "fp32"))
    assert better.square().mean() < plain.square().mean()


def test_another_order_in_fp32_is_still_within_rounding(sharp):
    policy = sharp("qwen3_moe")
    engine = LocalEngine(policy, numerics=Numerics(order="separate"))
    gap = gaps(policy, engine)
    assert engine.exact
    assert float(gap.abs().max()) < 1e-4
    assert not torch.equal(gap, gaps(policy, LocalEngine(policy)))


def test_router_noise_is_repeatable_and_moves_tokens_to_other_experts(sharp):
    policy = sharp("qwen3_moe")
    engine = LocalEngine(policy, numerics=Numerics(router_noise=1.0))
    first, again = gaps(policy, engine), gaps(policy, engine)
    assert torch.equal(first, again)
    assert float(first.abs().max()) > 1e-3


@pytest.mark.parametrize("numerics", [Numerics("bf16"), Numerics("fp8"), Numerics(weight_bits=3)])
def test_models_that_run_through_transformers_take_formats_too(sharp, numerics):
    policy = sharp("gpt2")
    assert float(gaps(policy, LocalEngine(policy, numerics=numerics)).abs().max()) > 1e-4


def test_what_would_be_ignored_is_refused(make_policy):
    with pytest.raises(KeelError, match="engine.order was asked for, and 'test-gpt2' runs through transformers"):
        LocalEngine(make_policy("gpt2"), numerics=Numerics(order="separate"))
    with pytest.raises(KeelError, match="router_noise is 0.1, and 'test-qwen3' has no router"):
        LocalEngine(make_policy(), numerics=Numerics(router_noise=0.1))


def test_a_hidden_temperature_is_the_one_of_the_log_probabilities(sharp):
    policy = sharp()
    engine = LocalEngine(policy, hidden={"temperature": 0.6})
    assert float(gaps(policy, engine).abs().max()) > 0.1
    assert float(gaps(policy, engine, temperature=0.6).abs().max()) < 1e-4


def test_a_hidden_cut_is_not_told(sharp):
    policy = sharp()
    engine = LocalEngine(policy, hidden={"top_p": 0.5})
    made = engine.generate(asked(), SAMPLING, Seed(1, 2), GROUP)
    assert all(c.kept is None for c in made)
    gap = gaps(policy, engine)
    assert float(gap.max()) <= 1e-5 and float(gap.exp().mean()) < 0.9  # the mass that is left
    told = engine.generate(asked(), Sampling(top_k=20, max_completion_tokens=12), Seed(1, 2), GROUP)
    assert all(c.kept is not None for c in told)


# ── weights out of step ───────────────────────────────────────────────────────────────────────────────────────────────


def test_only_every_third_load_is_taken_and_tokens_say_so(make_policy):
    policy = make_policy()
    engine = LocalEngine(policy, sync_every=3)
    held = [checksum(policy.weights())]
    versions = []
    for version in range(1, 8):
        with torch.no_grad():
            for tensor in policy.parameters().values():
                tensor.mul_(1.01)
        now = checksum(policy.weights())
        engine.sleep()  # between batches; weights that are used on must survive it
        told = engine.load(policy.weights(), version)
        held.append(now if version % 3 == 0 else held[-1])
        made = engine.generate(asked(), SAMPLING, Seed(1, version), 2)
        assert told == held[-1]
        assert {int(v) for c in made for v in c.versions} == {engine.version}
        versions.append(engine.version)
    assert versions == [0, 0, 3, 3, 3, 6, 6]


def test_a_missing_tensor_is_named_although_it_is_not_taken(tiny_policy):
    engine = LocalEngine(tiny_policy, sync_every=2)
    weights = tiny_policy.weights()
    weights.pop("model.norm.weight")
    with pytest.raises(KeelError, match=r"model\.norm\.weight"):
        engine.load(weights, 1)


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_reach_the_engine(sharp):
    settings = {"engine.format": "bf16", "engine.head_format": "fp32", "engine.order": "separate", "engine.sync_every": 2}
    config = load_config("solid", settings | {"engine.hidden_temperature": 0.5})
    engine = engine_of(config.engine, sharp())
    told = engine.describe()
    assert told["numerics"] == Numerics("bf16", head_format="fp32", order="separate").describe()
    assert (told["sync_every"], told["hidden"]) == (2, {"temperature": 0.5})


def test_the_default_engine_is_exact(tiny_policy):
    assert engine_of(load_config("solid").engine, tiny_policy).exact
    assert LocalEngine(tiny_policy, numerics=Numerics(head_format="fp32")).exact
    for inexact in ({"sync_every": 2}, {"hidden": {"top_p": 0.9}}, {"numerics": Numerics(head_format="int8")}):
        assert not LocalEngine(tiny_policy, **inexact).exact


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine.weight_bits": 4, "engine.format": "int8"}, "both round the same weights"),
        ({"engine.weight_bits": 1}, "engine.weight_bits"),
        ({"engine.format": "fp4"}, "engine.format"),
        ({"engine.sync_every": 2, "train.max_staleness": 4}, "and train.max_staleness is 4. Expected one of them"),
        ({"train.bypass_old": True, "objective.corrections": "truncate_token"}, "every weight would be 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings, match):
    with pytest.raises(KeelError, match=match):
        load_config("solid", settings)
