"""What an engine is: its protocol, its seeds, and the contract that every completion keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keel.errors import KeelError
from keel.models.checksum import check_arrival, checksum, fingerprints, tensor_hash
from keel.types import Completion, Prompt, Sampling

__all__ = ["Engine", "Seed", "check_arrival", "check_completions", "checksum", "fingerprints", "tensor_hash"]
LOGP_ROUNDING = 1e-5  # nats by which rounding may lift a log-probability above zero


@dataclass(frozen=True)
class Seed:
    """Where one rollout stands among all random draws. A sample's draws depend on (run, step, prompt, sample) and on no
    neighbour.

    Args:
        run: the run's seed.
        step: the optimizer step whose batch is sampled; evaluations take a number of their own.
    """

    run: int
    step: int

    def row(self, prompt_id: str, sample: int) -> tuple[int, int, int, int]:
        """The key of one sample's random generator: four non-negative integers."""
        digest = hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()
        return self.run, self.step, int.from_bytes(digest, "little"), sample


@runtime_checkable
class Engine(Protocol):
    """Something that completes prompts. Implement these five names, run `check_completions` on what you return, and
    keel can drive it.

    `version` is the step number of the weights in use. An engine whose policy differs from the trainer's by more than
    rounding in fp32 says so by an attribute `exact = False`: held-out evaluation then asks the trainer's policy apart. One that has
    processes or connections of its own ends them in a method `close()`.
    """

    version: int

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Seed, group_size: int) -> list[Completion]:
        """`group_size` completions of each rendered prompt, prompt-major: all samples of the first prompt first.

        Every token is the one that was sampled, with its log-probability under the distribution it was sampled from.
        Nothing but `sampling` shapes that distribution, a model's own generation_config in particular does not.
        """
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> str:
        """Take these weights, forget whatever was computed under older ones, and return `checksum` of what is now in
        use.

        Raises:
            KeelError: a tensor did not arrive; it is named, and the old weights stay.
        """
        ...

    def sleep(self) -> None:
        """Give back the memory of the weights in use: the next `load` brings others, and nothing is generated before it."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records: the engine's kind and every setting that can change a token."""
        ...


def check_completions(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    group_size: int,
    sampling: Sampling,
    *,
    end_ids: Collection[int],
    vocab_size: int,
    version: int | None = None,
    replay: bool = True,
) -> None:
    """The contract between an engine and the trainer, checked on a whole rollout (about 1 ms per 256 completions).

    Args:
        end_ids: of the policy; a completion ends with the first one that it samples.
        vocab_size: rows of the model's output head.
        version: what every token must have been sampled with; None allows any (asynchronous rollouts).
        replay: whether truncated sampling must bring its kept set, so that the trainer can renormalise over it.

    Raises:
        KeelError: naming the completion and what is wrong with it.
    """
    _check_places(prompts, completions, group_size)
    for c in completions:
        if c.finish == "error" and not c.error:
            _refuse(c, "finished with 'error' and does not say why", "a reason in `error`")
    alive = [c for c in completions if c.finish != "error"]
    for c in alive:
        _check_shape(c, sampling, replay)
    if not alive:
        return
    lengths = torch.tensor([len(c.token_ids) for c in alive])
    flat = _Flat(alive, lengths)
    for columns, bad, what, expected in _token_faults(flat, end_ids, vocab_size, version):
        _refuse_first(flat, columns, bad, what, expected)
    _check_finish(alive, lengths, flat.ends(end_ids), sampling)
    for c in alive:
        if c.kept is not None and not bool(c.kept.gather(1, c.token_ids.long()[:, None])[:, 0][c.sampled].all()):
            _refuse(c, "has a sampled token outside its own kept set", "sampled tokens inside it")


class _Flat:
    """All tokens of all completions in one row, with the completion that each belongs to."""

    def __init__(self, completions: Sequence[Completion], lengths: Int[Tensor, " B"]):
        self.completions = completions
        self.owner = torch.repeat_interleave(torch.arange(len(completions)), lengths)
        self.last = torch.zeros(len(self.owner), dtype=torch.bool)
        self.last[lengths.cumsum(0) - 1] = True
        self.token_ids = torch.cat([c.token_ids.cpu() for c in completions])
        self.logp = torch.cat([c.logp_rollout.cpu() for c in completions])
        self.versions = torch.cat([c.versions.cpu() for c in completions])
        self.sampled = torch.cat([c.sampled.cpu() for c in completions])

    def ends(self, end_ids: Collection[int]) -> Bool[Tensor, " N"]:
        return torch.isin(self.token_ids, torch.tensor(sorted(end_ids), dtype=self.token_ids.dtype)) & self.sampled


def _token_faults(flat: _Flat, end_ids: Collection[int], vocab_size: int, version: int | None) -> Iterator[tuple]:
    """(values, where they are wrong, what is wrong, what was expected) for every rule about single tokens."""
    ids, logp, sampled = flat.token_ids, flat.logp, flat.sampled
    yield ids, (ids < 0) | (ids >= vocab_size), "has token id {}", f"ids from 0 to {vocab_size - 1}"
    yield logp, sampled & ~torch.isfinite(logp), "has log-probability {}", "finite ones on sampled tokens"
    yield logp, sampled & (logp > LOGP_ROUNDING), "has log-probability {}", "none above 0"
    goes_on = torch.cat((sampled[1:], sampled.new_zeros(1))) & ~flat.last
    yield ids, flat.ends(end_ids) & goes_on, "samples on after end token {}", "its end there"
    if version is not None:
        wrong = sampled & (flat.versions != version)
        yield flat.versions, wrong, "was sampled by weights of version {}", f"version {version} throughout"


def _check_places(prompts: Sequence[Prompt], completions: Sequence[Completion], group_size: int) -> None:
    expected = [(prompt.id, sample) for prompt in prompts for sample in range(group_size)]
    if len(completions) != len(expected):
        counts = {p.id: sum(c.prompt_id == p.id for c in completions) for p in prompts}
        short = next((id for id, n in counts.items() if n != group_size), None)
        where = "" if short is None else f"; prompt {short!r} has {counts[short]}"
        raise KeelError(
            f"The engine returned {len(completions)} completions for {len(prompts)} prompts × {group_size}{where}. "
            f"Exactly {len(expected)} were expected: an engine that fails on one returns it with finish 'error' and "
            f"never leaves it out."
        )
    for place, (c, wanted) in enumerate(zip(completions, expected, strict=True)):
        if (c.prompt_id, c.sample) != wanted:
            _refuse(c, f"stands at place {place}", f"sample {wanted[1]} of prompt {wanted[0]!r} there (prompt-major)")


def _check_shape(c: Completion, sampling: Sampling, replay: bool) -> None:
    tokens, cap = len(c.token_ids), sampling.max_completion_tokens
    for name in ("logp_rollout", "versions", "sampled", "kept", "experts"):
        value = getattr(c, name)
        if value is not None and len(value) != tokens:
            _refuse(c, f"has {tokens} tokens and {len(value)} entries in {name}", "one entry a token")
    if c.experts is not None and bool((c.experts[:-1] < 0).any()):
        token = int((c.experts[:-1] < 0).flatten(1).any(1).int().argmax())
        _refuse(c, f"has no experts for token {token}", "those of every token but the last, which the engine never read")
    if tokens == 0:
        _refuse(c, "is empty", "at least the end token")
    if tokens > cap:
        _refuse(c, f"has {tokens} tokens", f"at most max_completion_tokens = {cap}")
    if replay and sampling.truncated and c.kept is None:
        found = "was sampled with top_p, top_k or min_p and does not say which tokens were kept"
        _refuse(c, found, "its kept set, to be replayed in training (or top_p=1, top_k=0 and min_p=0)")


def _check_finish(alive: Sequence[Completion], lengths: Tensor, ends: Tensor, sampling: Sampling) -> None:
    ended = ends[lengths.cumsum(0) - 1].tolist()
    for c, tokens, stop in zip(alive, lengths.tolist(), ended, strict=True):
        last = int(c.token_ids[-1])
        if c.finish == "stop" and not stop:
            _refuse(c, f"finished with 'stop' on token {last}", "a sampled end token last")
        if c.finish == "length" and stop:
            _refuse(c, f"finished with 'length' on end token {last}", "'stop'")
        if c.finish == "length" and tokens < sampling.max_completion_tokens:
            cap = sampling.max_completion_tokens
            _refuse(c, f"finished with 'length' after {tokens} tokens", f"max_completion_tokens = {cap} of them")


def _refuse_first(flat: _Flat, values: Tensor, bad: Bool[Tensor, " N"], what: str, expected: str) -> None:
    if bool(bad.any()):
        place = int(bad.int().argmax())
        owner = int(flat.owner[place])
        column = place - int((flat.owner < owner).sum())
        _refuse(flat.completions[owner], what.format(values[place].item()) + f" at token {column}", expected)


def _refuse(c: Completion, found: str, expected: str) -> None:
    raise KeelError(
        f"Completion {c.sample} of prompt {c.prompt_id!r} {found}; expected {expected}. The engine broke its contract "
        f"(see keel.rollout.engine.Engine); training on such a batch would go wrong without a sign, so mend the engine "
        f"first."
    )
