"""From groups of completions to one right-padded Batch, and from a Batch to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keel.types import Batch, Completion, Group, Prompt, Score


def batch_from_groups(groups: Sequence[Group]) -> Batch:
    """All completions of all groups, group after group; completions that an engine failed to make are left out.

    Trained tokens are those that the policy sampled, of completions that could be scored.
    """
    rows = list(members(groups))
    prompts = [torch.tensor(prompt.token_ids) for _, prompt, _, _ in rows]
    completions = [completion for _, _, completion, _ in rows]
    scores = [score for _, _, _, score in rows]
    scorable = torch.tensor([score.scorable for score in scores])
    sampled = pad_sequence([c.sampled for c in completions], batch_first=True)
    kept = None
    if any(c.kept is not None for c in completions):
        kept = pad_sequence([c.kept for c in completions], batch_first=True, padding_value=True)
    return Batch(
        tokens=pad_sequence([torch.cat((p, c.token_ids)) for p, c in zip(prompts, completions, strict=True)], batch_first=True),
        prompt_len=torch.tensor([len(p) for p in prompts]),
        completion_len=torch.tensor([len(c.token_ids) for c in completions]),
        mask=sampled & scorable[:, None],
        logp_rollout=pad_sequence([c.logp_rollout for c in completions], batch_first=True),
        group=torch.tensor([index for index, _, _, _ in rows]),
        reward=torch.tensor([float("nan") if s.value is None else s.value for s in scores]),
        scorable=scorable,
        correct=torch.tensor([s.correct for s in scores]),
        truncated=torch.tensor([c.finish == "length" for c in completions]),
        versions=pad_sequence([c.versions for c in completions], batch_first=True, padding_value=-1),
        kept=kept,
        experts_rollout=_experts(completions, [len(p) for p in prompts]),
    )


def members(groups: Sequence[Group]) -> Iterator[tuple[int, Prompt, Completion, Score]]:
    """Who becomes which row of the batch: (place of the group, prompt, completion, score)."""
    for index, group in enumerate(groups):
        for completion, score in zip(group.completions, group.scores, strict=True):
            if completion.finish != "error" and len(completion.token_ids) > 0:
                yield index, group.prompt, completion, score


def _experts(completions: Sequence[Completion], prompt_lengths: Sequence[int]) -> Int[Tensor, "B L layers k"] | None:
    """What the engine says of every token's experts, prompts included; −1 where it says nothing, None where it never does."""
    told = next((c.experts for c in completions if c.experts is not None), None)
    if told is None:
        return None
    rows = []
    for c, length in zip(completions, prompt_lengths, strict=True):
        before = told.new_full((length, *told.shape[1:]), -1) if c.prompt_experts is None else c.prompt_experts
        after = told.new_full((len(c.token_ids), *told.shape[1:]), -1) if c.experts is None else c.experts
        rows.append(torch.cat((before, after)))
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def split(batch: Batch, ranks: int, rows: Int[Tensor, " _"]) -> list[Int[Tensor, " _"]]:
    """Some rows dealt out to several ranks: whole groups, so that ranks have about as many tokens to compute.

    The largest group goes first, each to the rank with the least so far. A prompt counts once, for its completions share it. There
    may be ranks without rows.
    """
    if ranks == 1:
        return [rows]
    groups, index = torch.unique(batch.group[rows], return_inverse=True)
    work = torch.zeros_like(groups)
    work[index] = batch.prompt_len[rows]  # any of its rows: a group has one prompt
    work.index_add_(0, index, batch.completion_len[rows])
    owner, load = torch.zeros_like(groups), [0] * ranks
    for group in work.argsort(descending=True, stable=True).tolist():
        rank = load.index(min(load))
        owner[group] = rank
        load[rank] += int(work[group])
    return [rows[owner[index] == rank] for rank in range(ranks)]


def micro_batches(batch: Batch, max_tokens: int | None, rows: Int[Tensor, " _"] | None = None) -> list[Int[Tensor, " _"]]:
    """Cut a batch, or some of its rows, into runs of at most `max_tokens` prompt + completion tokens each (at least one row).

    Rows keep their order, so that siblings, which share their prompt's computation, stay together. None means no cut. The gradient
    does not depend on the cut: every denominator was taken before it.
    """
    rows = torch.arange(len(batch)) if rows is None else rows
    if max_tokens is None:
        return [rows]
    cuts, load = [], 0
    for place, tokens in enumerate((batch.prompt_len + batch.completion_len)[rows].tolist()):
        if load and load + tokens > max_tokens:
            cuts.append(place)
            load = 0
        load += tokens
    return list(torch.tensor_split(rows, cuts))
