"""A policy whose weights, gradients and optimizer states lie cut over several processes (FSDP2).

Each decoder layer is gathered when it is computed and let go of afterwards; embedding, last norm and head stay from the beginning
of a forward pass to the end of its backward pass. keel's own decoder and head read a module's weights without calling the module,
so they run their functions within it: `within(layer, function, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from keel.models.policy import Policy


def within(module: nn.Module, function: Callable[..., Any], *given: Any) -> Any:
    """`function(*given)`, while the module's own weights are whole.

    Args:
        given: tensors that need a gradient have to stand here, and not in what the function closes over.
    """
    return module.gathered(function, *given) if hasattr(module, "gathered") else function(*given)


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Cut a policy's weights over the processes of a mesh, in place. Gradients are summed over them, not averaged: every loss
    is divided by what the whole step holds.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    _ = policy.routers, policy.decoder or policy.head_is_linear  # measured while the weights are whole
    for module in (*decoder_layers(policy.base), policy.base):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)
        module.gathered = _apply
        register_fsdp_forward_method(module, "gathered")


def decoder_layers(base: nn.Module) -> Iterator[nn.Module]:
    """The layers of a transformers model, as the model itself says which of its modules are not to be divided."""
    names = set(base._no_split_modules or ())
    return (module for module in base.modules() if type(module).__name__ in names)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, where it is cut over processes, a gathered copy: then all of them have to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`whole` of each, detached; what bears two names (a tied head) is gathered once."""
    once = {id(tensor): whole(tensor.detach()) for tensor in tensors.values()}
    return {name: once[id(tensor)] for name, tensor in tensors.items()}


@torch.no_grad()
def cut_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every process has whole, cut as a parameter of its shape is; unchanged where there is nothing to cut."""
    if not is_sharded(parameter) or is_sharded(tensor) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    here = tensor.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _apply(function: Callable[..., Any], *given: Any) -> Any:
    return function(*given)
