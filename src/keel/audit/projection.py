"""A gradient of millions of numbers, seen through a few thousand random sums of them.

Each parameter belongs to one of `size` sums, with a random sign. Inner products of two gradients are kept in expectation, with a
standard deviation of about ‖g‖·‖h‖/√size; so a mean, a bias and a variance can be had without storing a single gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


class Projection:
    """Count-sketch of the gradients of named tensors. Where there are no more numbers than sums, it only concatenates.

    Args:
        parameters: name → tensor; only their shapes are read.
        size: number of sums.
        seed: of buckets and signs.

    Source: Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams". Differs from it: one row, and draws in
        place of hashes; they cost four bytes a parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], size: int = 4096, seed: int = 0):
        self.parameters = sum(p.numel() for p in parameters.values())
        self.exact = self.parameters <= size
        self.size = self.parameters if self.exact else size
        generator = torch.Generator().manual_seed(seed)
        self.places = {
            name: None if self.exact else _draws(2 * size, p.numel(), generator).to(p.device) for name, p in parameters.items()
        }

    @property
    def error(self) -> float:
        """Relative standard deviation of a squared norm, and of an inner product relative to the two norms, at most."""
        return 0.0 if self.exact else math.sqrt(2 / self.size)

    def __call__(self, gradient: Mapping[str, Tensor]) -> Float[Tensor, " size"]:
        """The sums, in float64 on the CPU."""
        if self.exact:
            return torch.cat([gradient[name].detach().flatten().double().cpu() for name in self.places])
        total = torch.zeros(2 * self.size, dtype=torch.float64)
        for name, place in self.places.items():
            numbers = gradient[name].detach().flatten().double()
            total += numbers.new_zeros(2 * self.size).index_add_(0, place, numbers).cpu()
        return total[: self.size] - total[self.size :]


def _draws(below: int, count: int, generator: torch.Generator) -> Tensor:
    """Bucket of each number; the upper half of the buckets is subtracted, so the sign comes with it."""
    return torch.randint(below, (count,), generator=generator, dtype=torch.int32)
