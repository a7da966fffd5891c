"""The objectives that a loss might be meant to follow, each from its definition, as a function of the parameters.

`TRUTHS[name](world, theta)` is a number that differentiates; a mean over prompts. Expectations are written out as sums over all
completions, so autograd of the number is the truth's gradient. Whatever is "held fixed" is taken at the world's own parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError, nearest
from keel.exact.world import World

Truth = Callable[[World, Float[Tensor, " D"]], Float[Tensor, ""]]


def expected_reward(world: World, theta: Tensor) -> Tensor:
    """J = E_π[R]: the reward of whole completions, graded without error."""
    return _per_prompt_reward(world, theta).mean()


def expected_grade(world: World, theta: Tensor) -> Tensor:
    """J of the grader: E_π of the chance that it accepts."""
    return (_chance(world, theta) * world.accepted).sum(1).mean()


def reverse_kl(world: World, theta: Tensor) -> Tensor:
    """KL(π‖π_ref) of whole completions."""
    logp, ref = _completions(world, theta)
    return (logp.exp() * (logp - ref)).sum(1).mean()


def forward_kl(world: World, theta: Tensor) -> Tensor:
    """KL(π_ref‖π) of whole completions."""
    logp, ref = _completions(world, theta)
    return (ref.exp() * (ref - logp)).sum(1).mean()


def reverse_kl_positions(world: World, theta: Tensor) -> Tensor:
    """Σ over prefixes of P(prefix)·KL(π‖π_ref) of the next token, the law of prefixes held fixed."""
    table = world.policy(theta)
    return _over_prefixes(world, (table.exp() * (table - world.ref)).sum(-1))


def reverse_kl_prefixes(world: World, theta: Tensor) -> Tensor:
    """Σ over lengths of the KL of the laws of prefixes that long, those that ended earlier left out: Σ p log(p/q) − p."""
    table = world.policy(theta)
    logp = world.tree.reach(table).log()[..., None] + table
    ref = world.tree.reach(world.ref).log()[..., None] + world.ref
    return (logp.exp() * (logp - ref - 1)).sum((1, 2)).mean()


def forward_kl_positions(world: World, theta: Tensor) -> Tensor:
    """Σ over prefixes of P(prefix)·KL(π_ref‖π) of the next token, the law of prefixes held fixed."""
    return _over_prefixes(world, (world.ref.exp() * (world.ref - world.policy(theta))).sum(-1))


def entropy(world: World, theta: Tensor) -> Tensor:
    """Entropy of whole completions."""
    logp, _ = _completions(world, theta)
    return -(logp.exp() * logp).sum(1).mean()


def entropy_positions(world: World, theta: Tensor) -> Tensor:
    """Σ over prefixes of P(prefix)·H of the next token, the law of prefixes held fixed."""
    table = world.policy(theta)
    return _over_prefixes(world, -(table.exp() * table).sum(-1))


def length(world: World, theta: Tensor) -> Tensor:
    """E_π of the completion's length: what a length penalty takes off."""
    return (_chance(world, theta) * world.tree.lengths).sum(1).mean()


def arcsine(world: World, theta: Tensor) -> Tensor:
    """2·arcsin √p of each prompt's pass rate p: the limit of a division by the group's standard deviation."""
    return 2 * _per_prompt_reward(world, theta).sqrt().arcsin().mean()


def grade_by_group_std(world: World, theta: Tensor) -> Tensor:
    """Each prompt's expected grade times c_G(p) at the present p: what a division by the group's std follows (for 0/1 grades).

    c_G(p) = E[k/G (1 − k/G) / (std_k + 1e-4)] / (p(1−p)), k ~ Bin(G, p), with the std's ddof 1; see `group_std_weight`.
    """
    present = (_chance(world, world.theta) * world.accepted).sum(1).tolist()
    weight = theta.new_tensor([group_std_weight(p, world.setting.group_size) for p in present])
    return ((_chance(world, theta) * world.accepted).sum(1) * weight).mean()


def group_std_weight(p: float, group_size: int, ddof: int = 1, eps: float = 1e-4) -> float:
    """c_G(p): by how much a division by the group's std scales the gradient of a prompt with pass rate p; 0 at p = 0 and 1."""
    if not 0 < p < 1:
        return 0.0
    total = 0.0
    for k in range(1, group_size):
        spread = k / group_size * (1 - k / group_size)
        std = math.sqrt(spread * group_size / (group_size - ddof)) + eps
        total += math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k) * spread / std
    return total / (p * (1 - p))


TRUTHS: dict[str, Truth] = {
    "J": expected_reward,
    "J_graded": expected_grade,
    "J_group_std": grade_by_group_std,
    "arcsine": arcsine,
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "reverse_kl_positions": reverse_kl_positions,
    "forward_kl_positions": forward_kl_positions,
    "reverse_kl_prefixes": reverse_kl_prefixes,
    "entropy": entropy,
    "entropy_positions": entropy_positions,
    "length": length,
}


def parse(expression: str) -> list[tuple[float, str]]:
    """Coefficients and names of a sum of truths: "J - 0.05 reverse_kl" → [(1.0, "J"), (−0.05, "reverse_kl")]; "0" → [].

    Raises:
        KeelError: a name that is no truth, with the nearest one.
    """
    if expression.strip() == "0":
        return []
    terms = re.findall(r"([+-]?)\s*(\d+(?:\.\d*)?(?:e-?\d+)?)?\s*\*?\s*([A-Za-z]\w*)", expression)
    for _, _, name in terms:
        if name not in TRUTHS:
            raise KeelError(f"{name!r} in {expression!r} is no truth; {nearest(name, TRUTHS)}Expected: {', '.join(TRUTHS)}.")
    return [((-1.0 if sign == "-" else 1.0) * float(number or 1), name) for sign, number, name in terms]


def gradient(world: World, expression: str) -> Float[Tensor, " D"]:
    """Gradient of a sum of truths in the world's parameters, by autograd."""
    theta = world.theta.clone().requires_grad_()
    value = theta.sum() * 0
    for coefficient, name in parse(expression):
        value = value + coefficient * TRUTHS[name](world, theta)
    return torch.autograd.grad(value, theta)[0]


def numeric_gradient(world: World, expression: str, step: float = 1e-5) -> Float[Tensor, " D"]:
    """The same by central differences."""
    terms = parse(expression)

    def value(theta: Tensor) -> float:
        return sum((coefficient * float(TRUTHS[name](world, theta)) for coefficient, name in terms), 0.0)

    shifts = step * torch.eye(len(world.theta), dtype=world.theta.dtype)
    return torch.tensor([(value(world.theta + s) - value(world.theta - s)) / (2 * step) for s in shifts], dtype=world.theta.dtype)


def _completions(world: World, theta: Tensor) -> tuple[Float[Tensor, "P N"], Float[Tensor, "P N"]]:
    return world.tree.of_completions(world.policy(theta)), world.tree.of_completions(world.ref)


def _chance(world: World, theta: Tensor) -> Float[Tensor, "P N"]:
    return world.tree.of_completions(world.policy(theta)).exp()


def _per_prompt_reward(world: World, theta: Tensor) -> Float[Tensor, " P"]:
    return (_chance(world, theta) * world.reward).sum(1)


def _over_prefixes(world: World, per_prefix: Float[Tensor, "P K"]) -> Float[Tensor, ""]:
    return (world.tree.reach(world.now) * per_prefix).sum(1).mean()
