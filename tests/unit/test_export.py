"""An exported folder is whole, plain, and the same policy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from keel.errors import KeelError
from keel.models.export import export
from keel.models.lora import LoraConfig, wrap
from keel.models.policy import Policy
from keel.models.templates import Template

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"


def with_lora(policy):
    model = wrap(policy.model, LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Policy(model, policy.tokenizer, policy.template, policy.end_ids, policy.name)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_folder_reads_back_as_the_same_policy(make_policy, tmp_path, kind, lora):
    policy = with_lora(make_policy(kind)) if lora else make_policy(kind)
    folder = export(policy, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("17+25=42").input_ids])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (policy.model, model))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    assert model.dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_exporting_changes_nothing_in_the_policy(tiny_policy, tmp_path):
    policy = with_lora(tiny_policy)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    trainable = set(policy.parameters())
    export(policy, tmp_path / "out")
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert set(policy.parameters()) == trainable


def test_every_end_token_and_no_sampling_parameter_is_passed_on(tiny_policy, tmp_path):
    tiny_policy.end_ids = frozenset({1, 7})
    tiny_policy.model.generation_config = GenerationConfig(temperature=0.6, top_k=20, do_sample=True)
    folder = export(tiny_policy, tmp_path / "out")
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 7]
    assert not {"temperature", "top_k", "top_p", "repetition_penalty", "do_sample"} & written.keys()


def test_the_template_is_passed_on(tiny_policy, tmp_path):
    tiny_policy.template = Template("inline", CHAT)
    folder = export(tiny_policy, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT
    assert (
        json.loads((folder / "keel_export.json").read_text())["template_sha256"]
        == tiny_policy.template.describe()["template_sha256"]
    )
    assert tiny_policy.tokenizer.chat_template is None


def test_an_existing_folder_is_refused_and_kept(tiny_policy, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(KeelError, match="it exists, and nothing is overwritten"):
        export(tiny_policy, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_a_place_that_cannot_be_written_leaves_nothing(tiny_policy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeelError, match="Cannot export to .*Nothing was left there"):
        export(tiny_policy, tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class FullDisk:
    """A tokenizer that finds the disk full when it is saved."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing(tiny_policy, tmp_path):
    tiny_policy.tokenizer = FullDisk(tiny_policy.tokenizer)
    with pytest.raises(KeelError, match="No space left on device"):
        export(tiny_policy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_reads_back_as_another_policy_is_not_kept(tiny_policy, tmp_path):
    class Forgetful(type(tiny_policy.model)):
        """Saves other weights than it computes with."""

        def save_pretrained(self, folder, **kwargs):
            weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
            weights["model.norm.weight"] *= 2
            super().save_pretrained(folder, state_dict=weights, **kwargs)

    tiny_policy.model.__class__ = Forgetful
    with pytest.raises(KeelError, match="reads back as another policy: log-probabilities differ by"):
        export(tiny_policy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
