"""A loss of one's own, as a bare function of log-probabilities: what it must look like, and how it is audited.

def my_loss(logp, logp_old, logp_rollout, logp_ref, advantages, mask):
    return -advantages * (logp - logp_old).exp()          # loss per token, [B, T]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError
from keel.objectives.advantages import Advantage, leave_one_out
from keel.objectives.aggregate import Aggregate, constant_length_mean
from keel.objectives.objective import Objective
from keel.objectives.signals import Prepared, keep
from keel.types import Batch, StepCounts

Function = Callable[..., Tensor]
ARGUMENTS = ("logp", "logp_old", "logp_rollout", "logp_ref", "advantages", "mask")


@dataclass(frozen=True)
class BareLoss:
    """A function (logp, logp_old, logp_rollout, logp_ref, advantages, mask) → loss per token [B, T], made auditable.

    Args:
        function: all arguments are [B, T]; only `logp` has a gradient.
        advantage: what rewards are turned into.
        aggregate: how its losses become a scalar.
    """

    function: Function
    advantage: Advantage = leave_one_out
    aggregate: Aggregate = constant_length_mean

    def prepare(self, batch: Batch, max_tokens: int) -> Prepared:
        """Advantages of the batch."""
        return Objective(advantage=self.advantage, aggregate=self.aggregate).prepare(batch, max_tokens)

    def counts(self, batch: Batch, prepared: Prepared, max_tokens: int) -> StepCounts:
        """The step's denominators."""
        return Objective(aggregate=self.aggregate).counts(batch, prepared, max_tokens)

    def loss(self, logp: Tensor, entropy: Tensor, batch: Batch, prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]:
        """This micro-batch's share of the step's loss."""
        mask = prepared.mask
        rest = (keep(x, mask) for x in (batch.logp_old, batch.logp_rollout, batch.logp_ref, prepared.advantage))
        return self.aggregate(keep(self.function(keep(logp, mask), *rest, mask), mask), prepared, counts)


def find_function(place: str) -> Function:
    """The function at "package.module:name" or "path/to/file.py:name".

    Raises:
        KeelError: no such module, file or name.
    """
    module, _, name = place.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            held = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(held)
        else:
            held = importlib.import_module(module)
    except (ImportError, FileNotFoundError) as missing:
        raise KeelError(f"{place!r}: {missing}. Expected package.module:function, or path/to/file.py:function.") from missing
    if not callable(getattr(held, name, None)):
        raise KeelError(f"{module} has no function {name!r}. It has: {', '.join(n for n in vars(held) if not n.startswith('_'))}.")
    return getattr(held, name)


def faults_of(function: Function) -> list[str]:
    """What is wrong with a bare loss, in sentences; empty when it can be audited."""
    inputs = _probe()
    logp = inputs[0].requires_grad_()
    try:
        out = function(logp, *inputs[1:])
    except Exception as error:
        return [f"It raised {type(error).__name__}: {error}. It is called with {', '.join(ARGUMENTS)}, each [B, T]."]
    return _shape_faults(out, logp) or _value_faults(function, inputs, out, logp)


def branches(function: Function) -> bool:
    """Whether it looks at values to decide what to compute, so that batches can only be taken one by one."""
    stacked = [torch.stack([x, x]) for x in _probe()]
    try:
        torch.vmap(function)(*stacked)
    except RuntimeError:
        return True
    return False


def _shape_faults(out: object, logp: Tensor) -> list[str]:
    if not isinstance(out, Tensor):
        return [f"It returned a {type(out).__name__}. Expected a tensor [B, T], the loss of each token."]
    if out.dim() == 0:
        return [
            "It returned a scalar. Expected the loss of each token, [B, T]: aggregation is chosen apart, so that it can be audited."
        ]
    if out.shape != logp.shape:
        return [f"It returned shape {list(out.shape)} for inputs {list(logp.shape)}. Expected the loss of each token, [B, T]."]
    if not out.requires_grad:
        return ["Its result has no gradient: it is not differentiable in logp. Look for .detach(), .item() or torch.no_grad()."]
    return []


def _value_faults(function: Function, inputs: tuple[Tensor, ...], out: Tensor, logp: Tensor) -> list[str]:
    mask, found = inputs[-1], []
    gradient = torch.autograd.grad(out[mask].sum(), logp, retain_graph=True)[0]
    if not out[mask].isfinite().all() or not gradient[mask].isfinite().all():
        found.append("It gives NaN or infinity on ordinary inputs (log-probabilities between -3 and 0).")
    elif not gradient[mask].any():
        found.append("Its gradient is zero everywhere: it ignores logp.")
    if found:
        return found
    junk = tuple(torch.where(mask, x, 7.0) if x.is_floating_point() else x for x in inputs)
    if not torch.allclose(function(*junk)[mask], out[mask], rtol=1e-12, atol=1e-12):
        found.append("Values under the mask reach the loss of other tokens. Replace them first: torch.where(mask, x, 0).")
    order = torch.arange(len(logp)).flip(0)
    if not torch.allclose(function(*(x[order] for x in inputs)), out[order], rtol=1e-9, atol=1e-9):
        found.append("The order of the rows changes a completion's loss. Expected completions to be exchangeable.")
    return found


def _probe() -> tuple[Tensor, ...]:
    """Four completions of up to three tokens, float64: log-probabilities, advantages of both signs, and a mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(3) < torch.tensor([1, 2, 3, 2])[:, None]
    base = -3 * torch.rand(4, 3, generator=generator, dtype=torch.float64)
    near = [base + 0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    advantages = torch.tensor([1.0, -0.5, 0.25, -0.75], dtype=torch.float64)[:, None].expand(4, 3)
    return tuple(torch.where(mask, x, 0.0) for x in (base, *near, advantages)) + (mask,)
