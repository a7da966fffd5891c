"""What an engine is: its seeds, proof that weights arrived in it, and the contract that every completion keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keel.errors import KeelError
from keel.types import Completion, Prompt, Sampling

LOGP_ROUNDING = 1e-6  # nats by which rounding may lift a log-probability above zero
_ODD = np.arange(1, 2**15 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)  # invertible mod 2⁶⁴


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
    """Something that completes prompts. Implement these four names, run `check_completions` on what you return, and
    keel can drive it.

    `version` is the step number of the weights in use.
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

    def describe(self) -> dict[str, Any]:
        """What the manifest records: the engine's kind and every setting that can change a token."""
        ...


# ---- weights ---------------------------------------------------------------------------------------------------------


def tensor_hash(tensor: Tensor) -> str:
    """16 hex digits of a tensor's dtype, shape and bits.

    Bits are read as 64-bit words; each run of 2¹⁵ words becomes Σ wordᵢ·oddᵢ mod 2⁶⁴, and the sums are hashed. An odd
    factor is invertible, so one changed element always changes its sum. About 8 GB/s on one core, against 1 GB/s of
    BLAKE2.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(flat) // (8 * len(_ODD)) * 8 * len(_ODD)
    tail = np.zeros(8 * len(_ODD), dtype=np.uint8)
    tail[: len(flat) - whole] = flat[whole:]
    head = _words(flat[:whole]).reshape(-1, len(_ODD)) @ _ODD
    last = _words(tail) @ _ODD
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    digest.update(head.tobytes() + last.tobytes())
    return digest.hexdigest()


def _words(raw: np.ndarray) -> np.ndarray:
    aligned = raw if raw.ctypes.data % 8 == 0 else raw.copy()
    return aligned.view(np.uint64)


def fingerprints(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """`tensor_hash` of every tensor by name; tensors that share memory (a tied head) are read once."""
    seen: dict[tuple, str] = {}
    out = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in seen or tensor.numel() == 0:
            seen[key] = tensor_hash(tensor)
        out[name] = seen[key]
    return out


def checksum(weights: Mapping[str, Tensor]) -> str:
    """32 hex digits for a whole set of weights, whatever the order of names; any one changed element changes them."""
    lines = sorted(f"{name} {digest}" for name, digest in fingerprints(weights).items())
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def check_arrival(sent: Mapping[str, Tensor], arrived: Mapping[str, Tensor], version: int) -> None:
    """Every tensor that was sent stands in `arrived`, bit for bit, and nothing else does.

    Raises:
        KeelError: naming the first tensor that is missing, unexpected, of another shape or dtype, or of other values.
    """
    for name in sorted(sent.keys() | arrived.keys()):
        problem = _difference(sent.get(name), arrived.get(name))
        if problem:
            raise KeelError(
                f"Weight sync to version {version}: tensor {name!r} {problem}. The engine would sample from other "
                f"weights than the trainer's, so it must not go on. Hand over everything that `Policy.weights()` "
                f"names, in its own dtype."
            )


def _difference(sent: Tensor | None, arrived: Tensor | None) -> str:
    """What is wrong with the tensor that arrived; empty when nothing is."""
    if sent is None:
        return "is in the engine but was never sent"
    if arrived is None:
        return "was sent but did not arrive"
    if sent.shape != arrived.shape or sent.dtype != arrived.dtype:
        return f"was sent as {sent.dtype} {tuple(sent.shape)} and arrived as {arrived.dtype} {tuple(arrived.shape)}"
    return "" if tensor_hash(sent) == tensor_hash(arrived) else "arrived with other values"


# ---- completions -----------------------------------------------------------------------------------------------------


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
