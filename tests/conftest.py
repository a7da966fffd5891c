"""Shapes and types are checked at run time in every test; and a tiny policy that needs no download."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("keel", "beartype.beartype")  # before anything imports keel

import pytest  # noqa: E402
import torch  # noqa: E402

CHARACTERS = "0123456789+-*=:?.,() \nABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def char_tokenizer(
    specials: tuple[str, ...] = ("<pad>", "<end>"), chat_template: str | None = None, *,
    frame: bool = False, lowercase: bool = False, split_special: bool = False,
):  # fmt: skip
    """One token a character; <pad> is 0, <end> is 1. Decoding never invents or drops a space.

    `frame` writes <pad> before and <end> after every text, `lowercase` loses case, `split_special` reads special tokens
    as characters: three faults to be found.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*specials, "<unk>", *CHARACTERS, "<", ">"))}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    if frame:
        ends = [("<pad>", 0), ("<end>", 1)]
        core.post_processor = processors.TemplateProcessing("<pad> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=chat_template,
        additional_special_tokens=list(specials[2:]), clean_up_tokenization_spaces=False,
        split_special_tokens=split_special,
    )  # fmt: skip


def tiny_model(kind: str = "qwen3", seed: int = 0, vocab_size: int | None = None, **changes):
    """A random model of 2 layers (DeepSeek: 3) and 10 to 30 thousand parameters; the global random state stays as it was."""
    import transformers

    vocab_size = vocab_size or len(CHARACTERS) + 5
    shared = dict(vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    llama = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    moe = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1)
    mixtral = dict(num_local_experts=4, num_experts_per_tok=2)
    deepseek = moe | dict(
        n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, num_hidden_layers=3, n_group=2, topk_group=1,
        q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
        num_key_value_heads=2,
    )  # fmt: skip
    kinds = {
        "mixtral": (transformers.MixtralConfig, llama | mixtral),
        "olmoe": (transformers.OlmoeConfig, llama | moe | dict(num_key_value_heads=2)),
        "qwen2_moe": (transformers.Qwen2MoeConfig, llama | moe | dict(shared_expert_intermediate_size=16)),
        "deepseek_v2": (transformers.DeepseekV2Config, llama | deepseek | dict(topk_method="group_limited_greedy")),
        "deepseek_v3": (transformers.DeepseekV3Config, llama | deepseek),
        "phimoe": (transformers.PhimoeConfig, llama | mixtral),
        "qwen3": (transformers.Qwen3Config, llama),
        "llama": (transformers.LlamaConfig, llama),
        "qwen3_moe": (transformers.Qwen3MoeConfig, llama | moe),
        "gpt2": (transformers.GPT2Config, dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)),
    }
    make_config, sizes = kinds[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = make_config(**(shared | sizes | changes))
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def make_policy():
    """make_policy("qwen3" | "llama" | "qwen3_moe" | "gpt2" | …, seed=0, **config) → a random Policy over characters."""

    def make(kind: str = "qwen3", seed: int = 0, **changes):
        from keel.models.policy import Policy
        from keel.models.templates import Template

        model = tiny_model(kind, seed, **changes)
        plain = Template("none")
        return Policy(model=model, tokenizer=char_tokenizer(), template=plain, end_ids=frozenset({1}), name=f"test-{kind}")

    return make


@pytest.fixture
def tiny_policy(make_policy):
    """A random Qwen3 policy over characters: 2 layers, hidden 32; a fresh one in every test."""
    return make_policy()


@pytest.fixture
def tokenizer():
    """The character tokenizer of `tiny_policy`."""
    return char_tokenizer()


@pytest.fixture
def make_tokenizer():
    """make_tokenizer(specials, chat_template, frame=…, lowercase=…, split_special=…) → a character tokenizer."""
    return char_tokenizer


@pytest.fixture
def make_completion():
    """make_completion(ids, prompt_id="p", sample=0, finish=None, logp=-1.0, **changes); end token 1 means "stop"."""

    def make(ids, prompt_id: str = "p", sample: int = 0, finish: str | None = None, logp: float = -1.0, **changes):
        from keel.types import Completion

        count = len(ids)
        fields = dict(
            prompt_id=prompt_id, sample=sample, token_ids=torch.tensor(ids, dtype=torch.long),
            logp_rollout=torch.full((count,), logp), finish=finish or ("stop" if 1 in ids[-1:] else "length"), text="",
            versions=torch.zeros(count, dtype=torch.long), sampled=torch.ones(count, dtype=torch.bool),
        )  # fmt: skip
        return Completion(**(fields | changes))

    return make


@pytest.fixture
def one_thread():
    """torch computes on one thread: for many small products, and beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
