"""vLLM's engine as far as it goes without vLLM: refusals, seeds, fields, the comparison after a sync, and the probe."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from keel.config import EngineSettings
from keel.errors import KeelError
from keel.models.checksum import fingerprints
from keel.rollout.engine import Seed
from keel.rollout.engines import engine_of
from keel.rollout.local import LocalEngine
from keel.rollout.probe import Probe, Reference, check_probe, probe
from keel.rollout.scripted import Fault, ScriptedEngine
from keel.rollout.vllm_parts import (
    aliases_of,
    check_receipt,
    engine_fields,
    read_finish,
    refuse_local_settings,
    refuse_routed_experts,
    refuse_truncated,
    sampling_fields,
    seed_of,
    split_routing,
    staging_folder,
    within,
    write_architecture,
)
from keel.rollout.vllm_worker import in_use
from keel.types import Sampling

HERE = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HERE, reason="vLLM is installed here")
def test_without_vllm_the_install_hint_is_given(tiny_policy):
    with pytest.raises(KeelError, match=r"vLLM cannot be imported .*pip install 'keel-rl\[vllm\]'"):
        engine_of(EngineSettings(name="vllm"), tiny_policy)


@pytest.mark.parametrize("changes", [dict(top_p=0.9), dict(top_k=5), dict(min_p=0.1)])
def test_truncated_sampling_is_refused(changes):
    with pytest.raises(KeelError, match="no kept sets"):
        refuse_truncated(Sampling(**changes))


def test_untruncated_sampling_is_not_refused():
    refuse_truncated(Sampling(temperature=0.7))


@pytest.mark.parametrize(
    "changes", [dict(format="fp8"), dict(weight_bits=4), dict(order="separate"), dict(router_noise=0.1), dict(hidden_top_p=0.9)]
)
def test_gaps_made_by_the_local_engine_are_refused(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(KeelError, match=f"engine.{name} is {value!r} with engine.name = vllm"):
        refuse_local_settings(EngineSettings(name="vllm", **changes))


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_number_formats_of_vllm_are_taken(format):
    refuse_local_settings(EngineSettings(name="vllm", format=format))


def test_routed_experts_are_refused_on_a_cpu():
    with pytest.raises(KeelError, match="newer model runner, which needs Triton"):
        refuse_routed_experts("cpu")
    refuse_routed_experts("cuda")


def test_a_record_of_routing_is_split_where_the_completion_begins():
    told = torch.arange(6 * 2 * 3).view(6, 2, 3).numpy()
    for extra in (told[:5], told):  # with and without the last token, which was sampled and never read
        prompt, completion = split_routing(extra, 2, 4)
        assert torch.equal(prompt, torch.as_tensor(told[:2]).to(torch.int16))
        assert torch.equal(completion[:3], torch.as_tensor(told[2:5]).to(torch.int16)) and (completion[3] == -1).all()


@pytest.mark.parametrize("told", [None, torch.zeros(4, 2, 3).numpy()])
def test_a_record_of_too_few_tokens_is_named(told):
    with pytest.raises(KeelError, match="Expected at least 5"):
        split_routing(told, 2, 4)


def test_seeds_differ_in_each_part_and_fit_63_bits():
    rows = [seed.row(p, s) for seed in (Seed(0, 0), Seed(0, 1), Seed(1, 0)) for p in "ab" for s in range(3)]
    seeds = [seed_of(row) for row in rows]
    assert len(set(seeds)) == len(rows) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(Seed(0, 0).row("a", 0)) == 813550020811835492  # the same in every process


def test_every_field_of_sampling_is_sent():
    fields = sampling_fields(Sampling(temperature=0.6, max_completion_tokens=9), {7, 3}, 5)
    assert fields["temperature"] == 0.6 and fields["max_tokens"] == 9 and fields["seed"] == 5
    assert fields["stop_token_ids"] == [3, 7] and fields["ignore_eos"] is True
    assert (fields["top_p"], fields["top_k"], fields["min_p"], fields["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


def test_vllm_is_started_without_generation_config_and_with_processed_log_probabilities(tmp_path):
    fields = engine_fields(tmp_path, 256, EngineSettings(name="vllm", format="bf16", kv_cache_gb=0.5), True)
    assert fields["generation_config"] == "vllm" and fields["logprobs_mode"] == "processed_logprobs"
    assert fields["dtype"] == "bfloat16" and fields["kv_cache_memory_bytes"] == 2**29


def test_the_architecture_folder_names_its_class(tiny_policy, tmp_path):
    from transformers import AutoConfig

    write_architecture(tiny_policy, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["Qwen3ForCausalLM"]


def test_a_tied_head_is_an_alias_of_the_embedding(tiny_policy, make_policy):
    assert aliases_of(tiny_policy.weights()) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert aliases_of(make_policy(tie_word_embeddings=False).weights()) == {}


def test_what_arrived_and_is_in_use_raises_no_alarm():
    check_receipt({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1"}, {"c": "a"}, 3)


@pytest.mark.parametrize(
    ("arrived", "in_use_now", "says"),
    [
        ({"a": "1"}, {}, "tensor 'b' was sent but did not arrive"),
        ({"a": "1", "b": "9"}, {}, "tensor 'b' was sent as 2 and arrived as 9"),
        ({"a": "1", "b": "2"}, {"b": "7"}, "tensor 'b' arrived, but the layers of the engine still compute with 7"),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "2", "head": "8"}, "tensor 'head' arrived, but the layers"),
    ],
)
def test_a_tensor_that_is_not_in_use_is_named(arrived, in_use_now, says):
    with pytest.raises(KeelError, match=f"version 3: {says}"):
        check_receipt({"a": "1", "b": "2"}, arrived, in_use_now, {"head": "a"}, 3)


class Packed(torch.nn.Linear):
    """A linear layer that hides its matrix, as vLLM's do on a CPU."""

    def __init__(self, matrix):
        super().__init__(*matrix.T.shape, bias=False)
        self.input_size_per_partition, self.hidden = matrix.shape[1], matrix.clone()
        self.weight.data = torch.empty(0)

    def cpu_linear(self, x, weight, bias):
        return x @ self.hidden.T


@pytest.fixture
def fused():
    """A model with one fused and packed projection, one plain norm; and what was sent for it."""
    draw = torch.Generator().manual_seed(0)
    sent = {f"block.{name}.weight": torch.randn(rows, 200, generator=draw) for name, rows in (("q", 6), ("k", 3))}
    sent["norm.weight"] = torch.randn(200, generator=draw)
    model = torch.nn.Module()
    model.packed_modules_mapping = {"qk": ["q", "k"]}
    model.block = torch.nn.ModuleDict({"qk": Packed(torch.cat([sent["block.q.weight"], sent["block.k.weight"]]))})
    model.norm = torch.nn.Module()
    model.norm.register_parameter("weight", torch.nn.Parameter(sent["norm.weight"].clone()))
    return model, sent


@pytest.mark.parametrize("version", [0, 1, 2])
def test_fused_and_packed_matrices_are_read_back(fused, version):
    model, sent = fused
    assert dict(in_use(model, sent, version)) == fingerprints(sent)


def test_an_old_packed_matrix_is_found_out(fused):
    model, sent = fused
    model.block["qk"].hidden[6:] += 1e-6  # the rows of k
    found, expected = dict(in_use(model, sent, 1)), fingerprints(sent)
    assert [name for name in sent if found[name] != expected[name]] == ["block.k.weight"]


def test_a_tensor_without_a_place_is_left_out(fused):
    model, sent = fused
    assert "elsewhere.weight" not in dict(in_use(model, sent | {"elsewhere.weight": torch.ones(2)}, 0))


def test_finish_reasons():
    assert read_finish("stop") == ("stop", "") and read_finish("length") == ("length", "")
    assert read_finish("abort") == ("error", "vLLM ended it with 'abort'")


def test_a_wait_ends():
    with pytest.raises(TimeoutError):
        within(lambda: time.sleep(2), 0.05)
    with pytest.raises(KeyError):
        within(lambda: {}["nothing"], 5.0)
    assert within(lambda: 3, 5.0) == 3


def test_staging_needs_room():
    assert staging_folder({"huge": torch.empty(1, device="meta").expand(2**50)}) is None


# ---- the probe, which any engine can be asked ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_the_reference_computes_what_the_policy_computes(make_policy, kind):
    policy = make_policy(kind)
    found = probe(LocalEngine(policy), policy, policy.weights(), policy.context)
    assert found.largest < 1e-4 < found.raw_largest
    check_probe(found, "float32", 0)


def test_the_reference_reads_the_weights_that_it_is_handed(make_policy):
    policy, other = make_policy(), make_policy(seed=5)
    engine = LocalEngine(policy)
    engine.load(other.weights(), 1)
    assert probe(engine, policy, other.weights(), 128, Reference(policy)).largest < 1e-4
    with pytest.raises(KeelError, match="samples from other weights"):
        check_probe(probe(engine, policy, policy.weights(), 128), "float32", 1)


def test_an_engine_that_returns_raw_log_probabilities_is_named(tiny_policy):
    tiny_policy.base.get_output_embeddings().weight.data.mul_(12.0)
    raw = [Fault("raw_logp", place=place) for place in range(4)]
    for faults in ([], raw):
        engine = ScriptedEngine(tiny_policy, lambda prompt, sample: [5, 6, 7 + sample, 1], faults=faults)
        found = probe(engine, tiny_policy, tiny_policy.weights(), 128)
        if faults:
            with pytest.raises(KeelError, match="It returns \\*raw\\* log-probabilities"):
                check_probe(found, "float32", 0)
        else:
            check_probe(found, "float32", 0)


def test_raw_log_probabilities_are_named_in_low_precision_too():
    check_probe(Probe(mean=0.02, largest=0.4, raw_mean=0.3, raw_largest=0.9), "bfloat16", 0)
    with pytest.raises(KeelError, match="raw"):
        check_probe(Probe(mean=0.3, largest=0.9, raw_mean=0.02, raw_largest=0.4), "bfloat16", 0)
