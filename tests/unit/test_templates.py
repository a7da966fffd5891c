"""Templates: prompts are rendered once, are prefixes of what follows, and lose no special token."""

from __future__ import annotations

import hashlib

import pytest

from keel.errors import KeelError
from keel.models.templates import Template, drifted, get_template, special_ids
from keel.types import Prompt

CHAT = (
    "{% for m in messages %}{{ '<start>' + m['role'] + ' ' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant ' }}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    return make_tokenizer(("<pad>", "<end>", "<start>"), CHAT)


def test_raw_text_is_its_characters(tokenizer):
    rendered = get_template("none", tokenizer).render(Prompt("p", "1+2=", "3"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(rendered.token_ids)) == list("1+2=")
    assert rendered.id == "p" and rendered.answer == "3"


def test_auto_takes_the_tokenizers_own_template_else_raw_text(tokenizer, chat_tokenizer):
    assert get_template("auto", tokenizer) == Template("none")
    assert get_template("auto", chat_tokenizer) == Template("tokenizer", CHAT)
    assert get_template("none", chat_tokenizer).source == ""


def test_chat_prompt_ends_where_the_answer_begins(chat_tokenizer):
    ids = get_template("auto", chat_tokenizer).render(Prompt("p", "1+2", "3"), chat_tokenizer).token_ids
    expected = ["<start>", *"user ", *"1+2", "<end>", "<start>", *"assistant "]
    assert chat_tokenizer.convert_ids_to_tokens(list(ids)) == expected


def test_a_jinja_file_and_its_text_give_the_same_hash(tmp_path, tokenizer):
    file = tmp_path / "ask.jinja"
    file.write_text("Q: {{ messages[0].content }} A:")
    from_file, inline = get_template(str(file), tokenizer), get_template(file.read_text(), tokenizer)
    assert from_file.describe()["template_sha256"] == inline.describe()["template_sha256"]
    assert inline.describe() == {
        "template": "inline",
        "template_sha256": hashlib.sha256(b"Q: {{ messages[0].content }} A:").hexdigest(),
    }


def test_healthy_templates_pass_their_checks(tokenizer, chat_tokenizer):
    Template("none").check(tokenizer, {1})
    Template("tokenizer", CHAT).check(chat_tokenizer, {1})


def test_a_template_that_rewrites_the_prompt_is_refused(chat_tokenizer):
    think = CHAT.replace("'<start>assistant '", "'<start>assistant think:'")
    with pytest.raises(KeelError, match="does not keep prompts.*'think:' against '42<end>'"):
        Template("think", think).check(chat_tokenizer, {1})


def test_a_special_token_that_the_tokenizer_does_not_read_as_one_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(("<pad>", "<end>", "<start>"), CHAT, split_special=True)
    with pytest.raises(KeelError, match=r"writes the special tokens \['<start>', '<end>', '<start>'\].*reads \[\]"):
        Template("tokenizer", CHAT).check(tokenizer, {1})


def test_a_prompt_that_ends_with_an_end_token_is_refused(chat_tokenizer):
    with pytest.raises(KeelError, match="ends its prompts with '<end>'"):
        bad = "{{ messages | map(attribute='content') | join('<end>') }}{% if messages | length == 1 %}<end>{% endif %}"
        Template("bad", bad).check(chat_tokenizer, {1})


def test_lossy_decoding_is_refused(make_tokenizer):
    with pytest.raises(KeelError, match=r"decodes '17\+25=42\\nA:42' as '17\+25=42\\na:42'"):
        Template("none").check(make_tokenizer(lowercase=True), {1})


def test_turn_end_is_the_token_that_closes_an_answer(tokenizer, chat_tokenizer):
    assert Template("tokenizer", CHAT).turn_end(chat_tokenizer) == chat_tokenizer.convert_tokens_to_ids("<end>")
    assert Template("none").turn_end(tokenizer) is None
    assert Template("open", "{{ messages[-1].content }}").turn_end(tokenizer) is None
    assert Template("text", "{{ messages[-1].content }} Next:").turn_end(tokenizer) is None


def test_the_clock_of_a_template_stands_still(tokenizer):
    dated = Template("dated", "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert dated.text("1+2", tokenizer) == "26 Jul 2024: 1+2"


def test_unreadable_characters_and_empty_prompts_are_refused(tokenizer):
    with pytest.raises(KeelError, match="Prompt 'p' holds '≤'"):
        Template("none").render(Prompt("p", "1≤2", ""), tokenizer)
    with pytest.raises(KeelError, match="renders to no tokens"):
        Template("none").render(Prompt("p", "", ""), tokenizer)


@pytest.mark.parametrize("spec", ["nones", "missing.jinja"])
def test_an_unknown_template_says_what_is_known(spec, tokenizer):
    with pytest.raises(KeelError, match="is no file. Expected 'none'"):
        get_template(spec, tokenizer)


@pytest.mark.parametrize("source", ["{{ messages[0].content", "{{ raise_exception('no system role') }}"])
def test_a_broken_template_is_named(source, tokenizer):
    with pytest.raises(KeelError, match="Chat template 'inline' cannot be rendered"):
        get_template(source, tokenizer).text("1+2", tokenizer)


def test_raw_text_keeps_bos_and_never_ends_with_eos(make_tokenizer):
    tokenizer = make_tokenizer(frame=True)  # <pad> stands for BOS: "<pad> text <end>"
    ids = Template("none").token_ids("1+2", tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<pad>", *"1+2"]


def test_retokenised_completions_that_differ_are_counted(make_tokenizer, make_completion):
    tokenizer = make_tokenizer(("<pad>", "<end>", "hello", "he", "llo"))
    he, llo, hello = (tokenizer.convert_tokens_to_ids(t) for t in ("he", "llo", "hello"))
    split, whole = make_completion([he, llo]), make_completion([hello])
    assert drifted([split, whole], tokenizer) == [split]


def test_special_ids_are_all_of_them(chat_tokenizer):
    assert special_ids(chat_tokenizer) == (0, 1, 2, 3)
