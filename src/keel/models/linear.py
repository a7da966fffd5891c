"""Matrix products for training, by whichever library multiplies faster here.

On a CPU in fp32, oneDNN's linear kernel does large products 15–30 % faster than the BLAS behind `F.linear`, and reads transposed
weights in place. It has no derivative of its own, so one is written here. Small matrices, other dtypes and other devices take
`F.linear`.

The kernel keeps scratch memory, about the size of the matrix, for every number of rows that it ever met. So it is used only for
regular numbers of rows, eight to an octave, and the decoder fills its rows up to one (`regular`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LARGE = 2**17  # numbers in a matrix from which oneDNN's kernel pays


def fast_products(weight: Tensor) -> bool:
    """Whether products with this matrix go by oneDNN."""
    here = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return here and weight.numel() >= LARGE and torch.backends.mkldnn.is_available()


def regular(rows: int) -> int:
    """The next number of rows that products are done for: a multiple of 64, at most 1/8 more."""
    grain = max(64, 2 ** (rows.bit_length() - 1) // 8)
    return -(-rows // grain) * grain


def product(x: Float[Tensor, "N in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "N out"]:
    """x Wᵀ, outside autograd; the weight may be a transposed view."""
    if fast_products(weight) and x.shape[0] == regular(x.shape[0]):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def apply_linear(layer: nn.Module, x: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
    """`layer(x)`: by the fast product for a plain `nn.Linear`; by the layer itself in autocast, and for anything else (LoRA …)."""
    if type(layer) is not nn.Linear or torch.is_autocast_enabled(x.device.type):
        return layer(x)
    out = _Product.apply(x, layer.weight)
    return out if layer.bias is None else out + layer.bias


class _GatedProduct(torch.autograd.Function):
    """Keeps the two factors and computes their product again in backward: half the memory of a gated layer, for little work."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return product(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        inner, chance = product(grad, weight.T), gate.sigmoid()
        opened = gate * chance  # SiLU; its slope is chance + opened · (1 − chance)
        grad_weight = grad.T @ (opened * up) if ctx.needs_input_grad[2] else None
        grad_up = inner * opened
        slope = opened.sub_(opened * chance).add_(chance)
        return inner.mul_(up).mul_(slope), grad_up, grad_weight


def apply_gated(layer: nn.Module, gate: Float[Tensor, "N in"], up: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
    """`layer(silu(gate) · up)`, a gated unit's last product; in autocast, and if not a plain `nn.Linear`, the layer is called."""
    if type(layer) is not nn.Linear or torch.is_autocast_enabled(gate.device.type):
        return layer(F.silu(gate) * up)
    out = _GatedProduct.apply(gate, up, layer.weight)
    return out if layer.bias is None else out + layer.bias
