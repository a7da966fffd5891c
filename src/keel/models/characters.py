"""The tokenizer of the bundled models: one token a character, 64 of them."""

from __future__ import annotations

SPECIALS = ("<pad>", "<end>", "<unk>")
CHARACTERS = "\n 0123456789+-*/=:?.,()<>abcdefghijklmnopqrstuvwxyzACDMNQRSTW"
VOCABULARY = {token: i for i, token in enumerate((*SPECIALS, *CHARACTERS))}
PAD, END, UNKNOWN = range(3)


def character_tokenizer():
    """A fast tokenizer of transformers over `VOCABULARY`. Encoding adds nothing; decoding gives the text back.

    <pad> (0) is not <end> (1), so that an end token is never mistaken for padding; a character without a token becomes
    <unk> (2), which rendering a prompt refuses.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIALS[UNKNOWN]))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[PAD],
        eos_token=SPECIALS[END],
        unk_token=SPECIALS[UNKNOWN],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="right",
    )


def encode(text: str) -> list[int]:
    """Token ids of a text made of `CHARACTERS`, as `character_tokenizer` gives them, only faster."""
    return [VOCABULARY[char] for char in text]
