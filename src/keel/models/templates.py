"""How a prompt becomes token ids: explicit, checked before the first rollout, and recorded in the manifest.

Only prompts are ever rendered. What an engine sampled is kept as token ids and never goes through text again.
"""

from __future__ import annotations

import hashlib
import os.path
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keel.errors import KeelError
from keel.types import Completion, Prompt

DATE = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"}
_CLOCK = "".join(f'|replace("{directive}", "{value}")' for directive, value in DATE.items())
STOPPED_CLOCK = "{%- macro strftime_now(format) -%}{{ format" + _CLOCK + " }}{%- endmacro -%}"
PROBES = ("42", "17 + 25 = 42", "17+25=42\nA:42", "The answer is 42.")


@dataclass(frozen=True)
class Template:
    """A way of asking: raw text, or a chat template whose only message is the prompt.

    A template that asks for today's date is told 26 July 2024 every day, so that a resumed run sees the same prompts.

    Args:
        name: "none", "tokenizer" (its own chat template), "inline", or the file that it came from.
        source: the Jinja text; empty for raw text.
    """

    name: str
    source: str = ""

    def describe(self) -> dict[str, str]:
        """Name and SHA-256 of the source, for the manifest: two runs with equal hashes ask in the same words."""
        return {"template": self.name, "template_sha256": hashlib.sha256(self.source.encode()).hexdigest()}

    def text(self, question: str, tokenizer, answer: str | None = None) -> str:
        """The conversation as text: up to where the model answers, or with an answer and whatever closes it."""
        if not self.source:
            return question + (answer or "")
        source = STOPPED_CLOCK + self.source if "strftime_now" in self.source else self.source
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # Jinja raises many kinds, and a template may raise its own
            raise KeelError(
                f"Chat template {self.name!r} cannot be rendered: {type(error).__name__}: {error}. Expected a Jinja "
                f"template over `messages` and `add_generation_prompt`. Mend it, or take template 'none' for raw text."
            ) from error

    def token_ids(self, question: str, tokenizer, answer: str | None = None) -> tuple[int, ...]:
        """Token ids of `text`. Raw text begins as the tokenizer begins texts, perhaps with BOS, and has no EOS."""
        text = self.text(question, tokenizer, answer)
        plain = tokenizer(text, add_special_tokens=False).input_ids
        return tuple(plain) if self.source else (*_beginning(tokenizer, text, plain), *plain)

    def render(self, prompt: Prompt, tokenizer) -> Prompt:
        """The same prompt with its token ids.

        Raises:
            KeelError: nothing is left after rendering, or the tokenizer has no token for a part of the text.
        """
        ids = self.token_ids(prompt.text, tokenizer)
        if not ids:
            raise KeelError(f"Prompt {prompt.id!r} renders to no tokens under template {self.name!r}. Give it a text.")
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown in ids and tokenizer.unk_token not in self.text(prompt.text, tokenizer):
            raise KeelError(
                f"Prompt {prompt.id!r} holds {_unknown_part(prompt.text, tokenizer)!r}, for which the tokenizer has no "
                f"token: the model would read {tokenizer.unk_token!r} instead. Leave it out of the prompts, or take a "
                f"model that can read it."
            )
        return replace(prompt, token_ids=ids)

    def check(self, tokenizer, end_ids: Collection[int]) -> None:
        """What must hold before a run: a prompt is a token prefix of prompt + answer, special tokens survive, text
        decodes as it was.

        Raises:
            KeelError: saying which of these fails, on which text, and where.
        """
        probes = [probe for probe in PROBES if _known(probe, tokenizer)]
        for probe in probes:
            _check_decode(probe, tokenizer)
        for answer in probes:
            self._check_prefix(probes[-1], answer, tokenizer)
        if probes:
            self._check_specials(probes[-1], tokenizer)
            last = self.token_ids(probes[-1], tokenizer)[-1]
            if last in end_ids:
                raise KeelError(
                    f"Template {self.name!r} ends its prompts with {tokenizer.decode([last])!r}, a token that ends "
                    f"completions: the model would be asked to write after its own end. Expected a prompt that ends "
                    f"where the answer begins; take another template."
                )

    def turn_end(self, tokenizer) -> int | None:
        """The special token with which the template closes an answer, if it does."""
        if not self.source:
            return None
        text = self.text("17 + 25", tokenizer, "42")
        tail = text[text.rfind("42") + 2 :].lstrip()
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        return ids[0] if ids and ids[0] in special_ids(tokenizer) else None

    def _check_prefix(self, question: str, answer: str, tokenizer) -> None:
        prompt, whole = self.token_ids(question, tokenizer), self.token_ids(question, tokenizer, answer)
        if self.source and whole[: len(prompt)] != prompt:
            same = len(os.path.commonprefix([prompt, whole]))
            raise KeelError(
                f"Chat template {self.name!r} does not keep prompts: with the answer {answer!r} the conversation "
                f"differs from the prompt at token {same}, {tokenizer.decode(prompt[same : same + 8])!r} against "
                f"{tokenizer.decode(whole[same : same + 8])!r}. A prompt must be a token prefix of prompt + answer, or "
                f"what is trained is not what is asked. Write the template to a Jinja file, mend it there, and give "
                f"that file as template."
            )

    def _check_specials(self, question: str, tokenizer) -> None:
        written = _special_strings(self.text(question, tokenizer), tokenizer)
        kept = set(special_ids(tokenizer))
        read = [tokenizer.convert_ids_to_tokens(i) for i in self.token_ids(question, tokenizer) if i in kept]
        if self.source and written != read:
            raise KeelError(
                f"Template {self.name!r} writes the special tokens {written} and the tokenizer reads {read}: markers "
                f"are lost or split on the way to token ids. Use this tokenizer's own markers in the template, or add "
                f"them to the tokenizer."
            )


def get_template(spec: str, tokenizer) -> Template:
    """A template by what the user wrote.

    Args:
        spec: "none" (raw text), "auto" (the tokenizer's own chat template, else raw text), a Jinja file, or Jinja text
            itself.

    Raises:
        KeelError: neither a known word, nor a file, nor Jinja.
    """
    if spec == "none":
        return Template("none")
    if spec == "auto":
        own = own_source(tokenizer)
        return Template("tokenizer", own) if own else Template("none")
    if "{{" in spec or "{%" in spec:
        return Template("inline", spec)
    path = Path(spec).expanduser()
    if path.is_file():
        return Template(spec, path.read_text(encoding="utf-8"))
    raise KeelError(
        f"Template {spec!r} is no file. Expected 'none' (raw text), 'auto' (the tokenizer's own chat template), the "
        f"path of a Jinja file, or a Jinja text with '{{{{' in it."
    )


def own_source(tokenizer) -> str:
    """The tokenizer's own chat template (the one named "default" where it has several), or the empty string."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), "")
    return own or ""


def special_ids(tokenizer) -> tuple[int, ...]:
    """Ids of all special tokens: those with a role (BOS, EOS …) and those only marked special."""
    marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return tuple(sorted({*marked, *tokenizer.all_special_ids}))


def drifted(completions: Iterable[Completion], tokenizer) -> list[Completion]:
    """Completions whose text, tokenised again, gives other ids than were sampled: what a pipeline through text would
    corrupt.

    A count for the record; keel trains on the sampled ids either way.
    """
    out = []
    for completion in completions:
        ids = completion.token_ids.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False).input_ids != ids:
            out.append(completion)
    return out


def _beginning(tokenizer, text: str, plain: Sequence[int]) -> tuple[int, ...]:
    """What the tokenizer puts before a text of its own accord."""
    whole = tokenizer(text).input_ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == list(plain):
            return tuple(whole[:start])
    return ()


def _known(text: str, tokenizer) -> bool:
    """Whether the tokenizer has tokens for all of a text."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return unknown is None or unknown not in tokenizer(text, add_special_tokens=False).input_ids


def _unknown_part(text: str, tokenizer) -> str:
    """The first character without a token, or the whole text where that cannot be told."""
    return next((char for char in text if not _known(char, tokenizer)), text)


def _check_decode(text: str, tokenizer) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back != text:
        raise KeelError(
            f"The tokenizer decodes {text!r} as {back!r}: rewards would grade another text than the model wrote. "
            f"Expected decoding to undo encoding; take the model's fast tokenizer, without text normalisation."
        )


def _special_strings(text: str, tokenizer) -> list[str]:
    """Special tokens written out in a text, in order."""
    names = sorted((tokenizer.convert_ids_to_tokens(i) for i in special_ids(tokenizer)), key=len, reverse=True)
    return re.findall("|".join(map(re.escape, names)), text) if names else []
