"""The shape in which another framework's loss is audited: `prepare`, `counts` and `loss`, as an `Objective` has them.

Their code reads lists, calls `.item()` and loops over rows. Enumeration runs thousands of batches at once through
`torch.vmap`; `outside` hands such code one batch at a time, as plain tensors, and carries its gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.audit.peers.source import version
from keel.errors import KeelError
from keel.objectives.aggregate import count
from keel.objectives.signals import Prepared
from keel.types import Batch, StepCounts


@dataclass(frozen=True)
class Rows:
    """What another framework's code may see of a batch: plain tensors, a row for each completion.

    Args:
        mask: [B, T] trained tokens.
        reward: [B]; NaN where unscorable.
        group: [B].
        length: [B] tokens of the completion.
        truncated: [B].
        logp_rollout, logp_old, logp_ref: [B, T]; `logp_old` is the sampler's where the batch has none, `logp_ref` may be NaN.
    """

    mask: Bool[Tensor, "B T"]
    reward: Float[Tensor, " B"]
    group: Int[Tensor, " B"]
    length: Int[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
    logp_rollout: Float[Tensor, "B T"]
    logp_old: Float[Tensor, "B T"]
    logp_ref: Float[Tensor, "B T"]

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        """The rows of a batch; masked log-probabilities are zero."""
        old = batch.logp_rollout if batch.logp_old is None else batch.logp_old
        ref = torch.full_like(old, float("nan")) if batch.logp_ref is None else batch.logp_ref
        logps = (torch.where(batch.mask, logp, 0.0) for logp in (batch.logp_rollout, old, ref))
        return cls(batch.mask, batch.reward, batch.group, batch.completion_len, batch.truncated, *logps)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, item.name) for item in fields(self))

    @property
    def last(self) -> Int[Tensor, " B"]:
        """Column of each completion's last token."""
        return self.length - 1


@dataclass(frozen=True)
class PeerPrepared(Prepared):
    """`Prepared`, and what else a framework computes before it cuts a batch.

    Args:
        weight: [B, T] its correction for the engine gap; 1 without one.
        old: [B, T] what its ratio is taken against; NaN where it takes the policy itself.
        whole: rows of the whole batch.
    """

    weight: Float[Tensor, "B T"]
    old: Float[Tensor, "B T"]
    whole: int

    def rows(self, index: Int[Tensor, " b"]) -> PeerPrepared:
        """The same quantities of only these rows, in this order."""
        picked = {item.name: getattr(self, item.name)[index] for item in fields(self) if item.name != "whole"}
        return replace(self, **picked)


@dataclass(frozen=True)
class PeerLoss:
    """One framework's loss under one configuration. Subclasses run its code on `Rows`.

    Args:
        peer, written_for: the framework, and the version of it that the adapter was written for.
        configuration: knobs that differ from the framework's defaults, by its own names (dotted for verl and OpenRLHF).
    """

    peer: ClassVar[str]
    written_for: ClassVar[str]

    configuration: Mapping[str, Any] = field(default_factory=dict)

    def advantages(self, rows: Rows, max_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(advantage, mask, weight, old), all [B, T], by its own code."""
        raise NotImplementedError(f"{type(self).__name__} needs `advantages`.")

    def step(self, logp: Tensor, entropy: Tensor, rows: Rows, prepared: PeerPrepared, tokens: Tensor, max_tokens: int) -> Tensor:
        """A micro-batch's contribution to the loss, by its own code."""
        raise NotImplementedError(f"{type(self).__name__} needs `step`.")

    def prepare(self, batch: Batch, max_tokens: int) -> PeerPrepared:
        """Its advantages and what else it computes over the whole batch."""

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with self._version_told():
                return tuple(part.to(batch.logp_rollout.dtype) for part in self.advantages(Rows(*tensors), max_tokens))

        advantage, mask, weight, old = _Values.apply(run, *Rows.of(batch).tensors())
        return PeerPrepared(advantage, mask > 0, batch.group, weight, old, len(batch))

    def counts(self, batch: Batch, prepared: Prepared, max_tokens: int) -> StepCounts:
        """The denominators of the optimizer step that these rows make up."""
        return count(prepared, max_tokens)

    def loss(
        self, logp: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], batch: Batch, prepared: Prepared, counts: StepCounts
    ) -> Float[Tensor, ""]:
        """This micro-batch's contribution to the step's loss, differentiable in `logp` and `entropy`."""

        def run(logp: Tensor, entropy: Tensor, *others: Tensor) -> Tensor:
            advantage, mask, group, weight, old, tokens, *rows = others
            cut = PeerPrepared(advantage, mask, group, weight, old, prepared.whole)
            with self._version_told():
                return self.step(logp, entropy, Rows(*rows), cut, tokens, counts.max_tokens)

        own = (prepared.advantage, prepared.mask, prepared.group, prepared.weight, prepared.old, counts.tokens)
        zero = torch.zeros_like(logp)
        logp, entropy = (torch.where(prepared.mask, value, zero) for value in (logp, entropy))
        return _Differentiable.apply(run, logp, entropy, *own, *Rows.of(batch).tensors())[0]

    def gradient(
        self, logp: Float[Tensor, "B T"], batch: Batch, max_tokens: int, cuts: int = 1
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B T"]]:
        """Loss and its gradient w.r.t. `logp`, of a whole batch in so many micro-batches."""
        return loss_and_gradient(self, logp, batch, max_tokens, cuts)

    @contextmanager
    def _version_told(self) -> Iterator[None]:
        """What another version wants of a stand-in is missing there: say that it is another version."""
        try:
            yield
        except (AttributeError, TypeError, KeyError) as error:
            if version(self.peer) == self.written_for:
                raise
            raise KeelError(
                f"{self.peer} {version(self.peer)} is installed, and asks for what it did not before: {error}. Expected version "
                f"{self.written_for}, for which its adapter was written; install that one."
            ) from error


def loss_and_gradient(
    loss: Any, logp: Float[Tensor, "B T"], batch: Batch, max_tokens: int, cuts: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T"]]:
    """Loss and gradient of anything with prepare, counts and loss, over a whole batch in so many micro-batches."""
    logp = logp.detach().requires_grad_()
    entropy = torch.zeros_like(logp)
    prepared = loss.prepare(batch, max_tokens)
    counts = loss.counts(batch, prepared, max_tokens)
    total = torch.zeros((), dtype=logp.dtype)
    for cut in torch.arange(len(batch)).tensor_split(cuts):
        total = total + loss.loss(logp[cut], entropy[cut], batch.rows(cut), prepared.rows(cut), counts)
    return total.detach(), torch.autograd.grad(total, logp)[0]


class _Values(torch.autograd.Function):
    """A function of tensors that `vmap` cannot enter, without gradient."""

    @staticmethod
    def forward(run: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(*(tensor.detach() for tensor in tensors))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.inputs = len(inputs)

    @staticmethod
    def backward(ctx, *_):
        return (None,) * ctx.inputs

    @staticmethod
    def vmap(info, in_dims, run: Callable, *tensors: Tensor):
        outputs = [_Values.apply(run, *batch) for batch in _unstack(info.batch_size, in_dims[1:], tensors)]
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])


class _Differentiable(torch.autograd.Function):
    """A scalar function of (logp, entropy, others) that `vmap` cannot enter, with its gradient in the first two."""

    @staticmethod
    def forward(run: Callable, logp: Tensor, entropy: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            inputs = [logp.detach().requires_grad_(), entropy.detach().requires_grad_()]
            loss = run(*inputs, *(other.detach() for other in others))
            slopes = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
        return loss.detach().to(logp.dtype), *(slope.to(logp.dtype) for slope in slopes)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.others = len(inputs) - 3

    @staticmethod
    def backward(ctx, outer, *_):
        slopes = (outer.reshape(outer.shape + (1,) * (slope.dim() - outer.dim())) * slope for slope in ctx.saved_tensors)
        return (None, *slopes, *(None,) * ctx.others)

    @staticmethod
    def vmap(info, in_dims, run: Callable, *tensors: Tensor):
        def run_all(*stacked: Tensor) -> Tensor:
            return torch.stack([run(*batch) for batch in zip(*stacked, strict=True)])

        batches = zip(*_unstack(info.batch_size, in_dims[1:], tensors), strict=True)
        return _Differentiable.apply(run_all, *(torch.stack(parts) for parts in batches)), (0, 0, 0)


def _unstack(size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """One tuple of tensors for each batch; those without a batch dimension stand in all of them."""
    of_each = [[t] * size if dim is None else list(t.unbind(dim)) for t, dim in zip(tensors, dims, strict=True)]
    return list(zip(*of_each, strict=True))
