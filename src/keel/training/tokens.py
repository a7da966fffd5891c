"""What single tokens looked like in an update: kept for a few groups now and then, to be read afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.config import RecordSettings
from keel.objectives.signals import Prepared
from keel.training.batch import members
from keel.types import Batch, Group

DIGITS = 4  # significant ones that are kept
TORN = "\ufffd"  # what a tokenizer shows of a character that is not whole


@dataclass(frozen=True)
class TokenTrace:
    """One completion in one update, token by token.

    Args:
        prompt_id, sample: which one.
        texts: [T] decoded one by one; joined they are the completion and its end token. A token in the middle of a character is "",
            and the one that ends it has it whole.
        values: name → [T] numbers: logp_rollout, logp, entropy in nats; gap = logp_old − logp_rollout in nats; ratio = exp(logp −
            logp_old); advantage. Without a logp_old the update was on-policy: the ratio is 1, and the gap is against logp.
    """

    prompt_id: str
    sample: int
    texts: tuple[str, ...]
    values: dict[str, tuple[float, ...]] = field(repr=False)

    def as_row(self) -> dict[str, Any]:
        """For tokens.jsonl: rounded, and a value that all tokens share is written once."""
        told = {name: _rounded(values) for name, values in self.values.items()}
        return {"prompt_id": self.prompt_id, "sample": self.sample, "tokens": list(self.texts), **told}


def groups_to_trace(settings: RecordSettings, batch: int, groups: int) -> frozenset[int]:
    """Which groups of a batch are kept: none, or some spread evenly, so that every update of the batch has its share."""
    if settings.tokens_every == 0 or batch % settings.tokens_every:
        return frozenset()
    kept = min(settings.tokens_groups, groups)
    return frozenset((2 * n + 1) * groups // (2 * kept) for n in range(kept))


@torch.no_grad()
def trace(
    tokenizer: Any,
    groups: Sequence[Group],
    wanted: frozenset[int],
    rows: Int[Tensor, " _"],
    batch: Batch,
    prepared: Prepared,
    logp: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
) -> list[TokenTrace]:
    """The completions of the wanted groups in one update. Nothing is computed that the update did not compute.

    Args:
        groups: of the whole rollout batch.
        wanted: of them, by place.
        rows: of the whole batch that the update trains on; the tensors that follow hold these rows.
        batch, prepared, logp, entropy: of the update, as its loss saw them.
    """
    everyone = list(members(groups))
    return [
        _traced(tokenizer, everyone[row][2], n, batch, prepared, logp, entropy)
        for n, row in enumerate(rows.tolist())
        if everyone[row][0] in wanted
    ]


def _traced(tokenizer: Any, completion: Any, n: int, batch: Batch, prepared: Prepared, logp: Tensor, entropy: Tensor) -> TokenTrace:
    length = len(completion.token_ids)
    now, engine = logp[n, :length].float(), batch.logp_rollout[n, :length].float()
    old = now if batch.logp_old is None else batch.logp_old[n, :length].float()
    trained = prepared.mask[n, :length]
    values = {
        "logp_rollout": engine,
        "logp": now,
        "entropy": entropy[n, :length].float(),
        "ratio": (now - old).exp(),
        "gap": old - engine,
        "advantage": torch.where(trained, prepared.advantage[n, :length], 0.0),
    }
    texts = token_texts(tokenizer, completion.token_ids.tolist())
    return TokenTrace(completion.prompt_id, completion.sample, texts, {k: tuple(v.tolist()) for k, v in values.items()})


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Every token's own part of the decoded text."""
    alone = tuple(_alone(tokenizer, each) for each in ids)
    if "".join(alone) == _decoded(tokenizer, ids):
        return alone
    return tuple(_in_turn(tokenizer, ids))


def _in_turn(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text that each token adds to those before it: for tokenizers whose tokens read otherwise alone."""
    begin = read = 0
    for end in range(1, len(ids) + 1):
        before, now = _decoded(tokenizer, ids[begin:read]), _decoded(tokenizer, ids[begin:end])
        if now.endswith(TORN) and end < len(ids):
            yield ""
            continue
        yield now[len(before) :]
        begin, read = read, end


@lru_cache(maxsize=8192)
def _alone(tokenizer: Any, each: int) -> str:
    return _decoded(tokenizer, [each])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _rounded(values: Sequence[float]) -> list[float] | float:
    short = [float(f"{value:.{DIGITS}g}") for value in values]
    return short[0] if len(short) > 1 and all(value == short[0] for value in short) else short
