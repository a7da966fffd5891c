"""Several processes that train one policy together: who is here, and the few things that they do with one another.

As data, every rank holds the whole batch of a step: so advantages, denominators and metrics are those of a single process, whatever
the number of ranks. What takes time is divided: sampling and grading by prompts, forward and backward passes by rows. A single
process is `ALONE`, with which each of these does nothing.

All ranks come to each of these in the same order, since they decide everything from the same data. What fails on one fails on all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from keel.errors import KeelError
from keel.models.policy import Policy
from keel.models.sharding import shard
from keel.training.transfer import dumps, loads

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, seen from one of them.

    Args:
        rank: its own number, from 0.
        size: of all.
        sharded: weights, gradients and optimizer states are cut over them; otherwise each has its own.
        lasting: someone else brought them together, and they can reach one another after the run too.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    lasting: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What `make` returns on every rank, in the order of ranks.

        Raises:
            KeelError: it failed on another rank, which is named. Where it failed itself, its own error is raised.
        """
        if self.size == 1:
            return [make()]
        error, made = None, None
        try:
            made = make()
        except Exception as failure:
            error = failure
        told = _exchange(dumps((_said(error), made)), self.size)
        if error is not None:
            raise error
        for rank, (failed, _) in enumerate(told):
            if failed:
                raise KeelError(f"Rank {rank} of {self.size} failed, so all stop. It said: {failed}")
        return [each for _, each in told]

    def by_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone calls it while the others wait."""
        return self.gather(lambda: make() if self.first else None)[0]

    def spread(self, answer: Callable[[Sequence[T]], list[S]]) -> Callable[[Sequence[T]], list[S]]:
        """The same function of a list, of which every rank answers a run of its own; all get all answers, in order."""

        def together(asked: Sequence[T]) -> list[S]:
            begin, end = (len(asked) * n // self.size for n in (self.rank, self.rank + 1))
            mine = asked[begin:end]
            return [each for part in self.gather(lambda: answer(mine) if mine else []) for each in part]

        return answer if self.size == 1 else together

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        return any(self.gather(lambda: here))

    def sums(self, here: Mapping[str, float]) -> dict[str, float]:
        """Every number added up over the ranks that have it."""
        out: dict[str, float] = {}
        for part in self.gather(lambda: dict(here)):
            out |= {name: out.get(name, 0.0) + value for name, value in part.items()}
        return out

    def complete(self, found: Sequence[Tensor | None], rows: Int[Tensor, " _"]) -> list[Tensor | None]:
        """Tensors [B, …] of which every rank computed some rows, with the rows of all; None where no rank has one.

        Args:
            found: right in its own rows, and anything elsewhere.
            rows: its own.
        """
        if self.size == 1:
            return list(found)
        told = self.gather(lambda: (rows, [None if value is None else value[rows] for value in found]))
        return [_assembled([(where, values[place]) for where, values in told], value) for place, value in enumerate(found)]

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every parameter's gradient over ranks, in place; a rank without one adds nothing. Sharded ones were summed already,
        layer by layer.
        """
        if self.size == 1 or self.sharded:
            return
        held = torch.tensor([float(p.grad is not None) for p in parameters])
        with _lost_ranks():
            dist.all_reduce(held)
            wanted = [p for p, count in zip(parameters, held.tolist(), strict=True) if count]
            for parameter in wanted:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in wanted]:
                work.wait()

    def check_same(self, told: Mapping[str, Any]) -> None:
        """Refuse to go on where ranks differ in what has to be the same.

        Raises:
            KeelError: naming everything that differs, and what each rank has.
        """
        seen = self.gather(lambda: dict(told))
        names = sorted({name for each in seen for name in each})
        apart = {name: [each.get(name) for each in seen] for name in names}
        differing = [f"{name} ({_by_rank(values)})" for name, values in apart.items() if any(v != values[0] for v in values)]
        if differing:
            raise KeelError(
                f"The ranks of this run differ in {', '.join(differing)}. Expected the same everywhere: they would compute "
                "different numbers and train one policy with them. Install the same versions, and give every rank the same "
                "settings, model and data."
            )

    def cut(self, policy: Policy, device: str) -> None:
        """Cut the policy's weights over the ranks, where they are to be."""
        if self.sharded and self.size > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shard(policy, init_device_mesh(torch.device(device).type, (self.size,)))


ALONE = Ranks()


def launched() -> int:
    """How many processes this run was started with: torchrun and its like say so in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(parallel: str, device: str, timeout_s: float, *, resuming: bool = False) -> Iterator[Ranks]:
    """While inside, the processes of this run can reach one another. A process group that is there already is used, and left; a
    program that trains several times should begin one itself, for torch's rendezvous does not take a second one well.

    Args:
        parallel: none, ddp or fsdp.
        device: cpu or cuda; then each process takes the card of its own number.
        timeout_s: how long one waits for another before it gives up.
        resuming: a run of several ranks may go on alone.

    Raises:
        KeelError: several processes were started for a run that is not parallel, or one for a run that is.
    """
    size = launched()
    _refuse_mismatch(parallel, size, resuming)
    if size == 1:
        yield ALONE
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(_card())
    began = not dist.is_initialized()
    if began:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        with _lost_ranks():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), parallel == "fsdp", lasting=not began)
    try:
        yield ranks
        ranks.gather(lambda: None)  # whatever was exchanged last, this is later, and leaves nothing behind
    finally:
        if began:
            dist.destroy_process_group()


def _refuse_mismatch(parallel: str, size: int, resuming: bool) -> None:
    if size > 1 and parallel == "none":
        raise KeelError(
            f"{size} processes were started, and train.parallel is none: each would train a policy of its own and write to the "
            "same folder. Expected train.parallel = ddp (every process holds the whole model) or fsdp (weights, gradients and "
            "optimizer are cut over them), or one process."
        )
    if size == 1 and parallel != "none" and not resuming and "RANK" not in os.environ:
        raise KeelError(
            f"train.parallel is {parallel}, and this is a single process. Expected several: torchrun --nproc-per-node 2 -m keel "
            f"train ... --train.parallel {parallel}. Or leave train.parallel out."
        )


def _card() -> int:
    """The card of this process.

    Raises:
        KeelError: there are fewer cards than processes.
    """
    number, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= cards:
        raise KeelError(
            f"train.device is cuda, and process {number} of this machine found {cards} cards. Expected one for each process: start "
            f"{cards or 'no'} of them here, or train with --train.device cpu."
        )
    return number


def _exchange(data: bytes, size: int) -> list[Any]:
    """Bytes of every rank, read."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    length, lengths = torch.tensor([len(mine)]), [torch.zeros(1, dtype=torch.long) for _ in range(size)]
    with _lost_ranks():
        dist.all_gather(lengths, length)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        out = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
        dist.all_gather(out, padded)
    _let_go((length, *lengths, padded, *out))
    return [loads(part[: int(length)].numpy().tobytes()) for part, length in zip(out, lengths, strict=True)]


def _let_go(tensors: Sequence[Tensor], limit_s: float = 1.0) -> None:
    """Wait until nobody else holds these. A thread of gloo's keeps what it sent a moment longer than the call that waited for it.
    Where it is the last to let go it needs the interpreter for that, and takes the process down if this one is ending.
    """
    end = time.monotonic() + limit_s
    while any(tensor._use_count() > 1 for tensor in tensors) and time.monotonic() < end:
        time.sleep(0)


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """An error of the network in our own words."""
    try:
        yield
    except RuntimeError as fault:
        said = str(fault).strip().splitlines()[0].rstrip(".")
        raise KeelError(
            f"The ranks of this run lost one another: {said}. Expected all of them within train.rank_timeout_s. One may "
            "have died, or is much slower; its own output says more. What was saved is whole: go on with `keel train --resume`."
        ) from fault


def _assembled(parts: Sequence[tuple[Tensor, Tensor | None]], mine: Tensor | None) -> Tensor | None:
    like = mine if mine is not None else next((value for _, value in parts if value is not None), None)
    if like is None:
        return None
    out = like.new_empty(sum(len(rows) for rows, _ in parts), *like.shape[1:])
    for rows, value in parts:
        if value is not None:
            out[rows] = value
    return out


def _said(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) if isinstance(error, KeelError) else f"{type(error).__name__}: {error}"


def _by_rank(values: Sequence[Any]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
