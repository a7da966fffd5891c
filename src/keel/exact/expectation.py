"""The expectation of a loss's own gradient, over every batch that could be sampled.

A batch holds one group for each prompt. Groups are enumerated as multisets of outcomes (a completion and the reward it got), each
with its multinomial probability: C(K + G − 1, G) of them for K outcomes and groups of G, instead of K^G tuples, to the power of the
number of groups. The loss is the one that trains: `prepare`, `counts` and `loss` of the objective, cut into micro-batches, over all
batches at once (`torch.vmap`).

The gradient comes out as the direction that an update takes, −∇loss, with 1 in place of the constant divisor `max_tokens`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.errors import KeelError
from keel.exact.world import Setting, World
from keel.objectives.signals import Prepared
from keel.types import Batch, StepCounts

LARGEST = 200_000  # batches that are enumerated at most
LARGEST_ONE_BY_ONE = 5_000
AT_ONCE = 2**18  # completions that pass through the loss together


@runtime_checkable
class Loss(Protocol):
    """What can be audited: an `Objective`, or anything that goes through the same three steps."""

    def prepare(self, batch: Batch, max_tokens: int) -> Prepared: ...

    def counts(self, batch: Batch, prepared: Prepared, max_tokens: int) -> StepCounts: ...

    def loss(self, logp: Tensor, entropy: Tensor, batch: Batch, prepared: Prepared, counts: StepCounts) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class Expectation:
    """What a loss does on average.

    Args:
        direction: [D] the expected update direction, −E[∇loss].
        second_moment: E‖∇loss‖².
        batches: how many batches were enumerated.
    """

    direction: Float[Tensor, " D"]
    second_moment: float
    batches: int

    @property
    def variance(self) -> float:
        """Trace of the covariance of one batch's gradient."""
        return max(0.0, self.second_moment - float(self.direction.square().sum()))

    @property
    def signal_to_noise(self) -> float:
        """‖E[g]‖ over the root of the covariance's trace, for one batch."""
        return float(self.direction.norm()) / math.sqrt(self.variance) if self.variance else math.inf


def expect(world: World, loss: Loss) -> Expectation:
    """The expectation of `loss` in this world.

    Raises:
        KeelError: more than `LARGEST` batches; a smaller setting is suggested.
    """
    outcomes = Outcomes.of(world)
    rows, chance = enumerate_batches(world.setting, outcomes)
    slope = _Slope.of(world)
    direction, second = torch.zeros_like(world.theta), 0.0
    for part, weight in zip(*(x.split(max(1, AT_ONCE // rows.shape[1])) for x in (rows, chance)), strict=True):
        gradient = -slope.of_batches(*token_gradients(world, outcomes, loss, part), outcomes.place[part])
        direction += weight @ gradient
        second += float(weight @ gradient.square().sum(1))
    return Expectation(direction, second, len(rows))


@dataclass(frozen=True)
class Outcomes:
    """All that one sample can turn out to be, over all prompts: R of them.

    Args:
        prompt, completion: [R] which; place: [R] index of the pair in [P · N].
        reward: [R] the grade that it got.
        chance: [R] its probability under the sampler and the grader, given the prompt.
        correct: [R] whether it was graded right.
    """

    prompt: Int[Tensor, " R"]
    completion: Int[Tensor, " R"]
    reward: Float[Tensor, " R"]
    chance: Float[Tensor, " R"]

    @classmethod
    def of(cls, world: World) -> Outcomes:
        """Outcomes of probability 0 are left out."""
        value, grading = world.graded
        chance = world.tree.of_completions(world.sampler).exp()[..., None] * grading
        prompt, completion, grade = chance.nonzero(as_tuple=True)
        return cls(prompt, completion, value[prompt, completion, grade].double(), chance[prompt, completion, grade])

    @property
    def place(self) -> Int[Tensor, " R"]:
        return self.prompt * (int(self.completion.max()) + 1) + self.completion

    @property
    def correct(self) -> Bool[Tensor, " R"]:
        return self.reward > 0.5


def enumerate_batches(setting: Setting, outcomes: Outcomes) -> tuple[Int[Tensor, "M B"], Float[Tensor, " M"]]:
    """Every batch as rows of outcomes, and its probability.

    A batch has one group of every prompt. With `live_only` each of its groups is any prompt's, drawn again until it is live.
    """
    per_prompt = [(outcomes.prompt == p).nonzero()[:, 0] for p in range(setting.prompts)]
    _refuse_large(setting, [len(rows) for rows in per_prompt])
    groups = [_multisets(rows, outcomes.chance[rows], setting.group_size) for rows in per_prompt]
    if setting.live_only:
        rows, chance = (torch.cat(parts) for parts in zip(*groups, strict=True))
        right = outcomes.correct[rows].sum(1)
        live = (right > 0) & (right < setting.group_size)
        groups = [(rows[live], chance[live] / chance[live].sum())] * setting.prompts
    rows, chance = groups[0]
    for more, its_chance in groups[1:]:
        rows = torch.cat([rows.repeat_interleave(len(more), 0), more.repeat(len(rows), 1)], 1)
        chance = torch.outer(chance, its_chance).flatten()
    return rows, chance


def count_batches(setting: Setting, outcomes: int) -> int:
    """How many batches a setting has, for so many outcomes a prompt."""
    of_prompt = math.comb(outcomes + setting.group_size - 1, setting.group_size)
    return (of_prompt * setting.prompts if setting.live_only else of_prompt) ** setting.prompts


def _refuse_large(setting: Setting, outcomes: list[int]) -> None:
    count = count_batches(setting, max(outcomes))
    if count <= LARGEST:
        return
    smaller = next(
        (
            (prompts, size)
            for prompts in range(setting.prompts, 0, -1)
            for size in range(setting.group_size, 0, -1)
            if count_batches(replace(setting, prompts=prompts, group_size=size), max(outcomes)) <= LARGEST
        ),
        None,
    )
    hint = (
        f"prompts={smaller[0]} with group_size={smaller[1]} fits" if smaller else "Take fewer tokens: vocabulary=2 or max_tokens=2"
    )
    raise KeelError(
        f"{setting.prompts} groups of {setting.group_size} out of {max(outcomes)} outcomes make {count:,} batches. Expected "
        f"at most {LARGEST:,}: (outcomes + group_size − 1 over group_size) to the power of prompts. {hint}."
    )


def _multisets(rows: Int[Tensor, " K"], chance: Float[Tensor, " K"], size: int) -> tuple[Int[Tensor, "C G"], Float[Tensor, " C"]]:
    """Every multiset of `size` outcomes, and its multinomial probability."""
    picked = torch.tensor(list(itertools.combinations_with_replacement(range(len(rows)), size)))
    times = torch.zeros(len(picked), len(rows), dtype=chance.dtype)
    times.scatter_add_(1, picked, torch.ones_like(picked, dtype=chance.dtype))
    orders = torch.lgamma(torch.tensor(size + 1.0, dtype=chance.dtype)) - torch.lgamma(times + 1).sum(1)
    return rows[picked], orders.exp().round() * chance[picked].prod(1)


def token_gradients(
    world: World, outcomes: Outcomes, loss: Loss, rows: Int[Tensor, "M B"]
) -> tuple[Float[Tensor, "M B T"], Float[Tensor, "M B T"]]:
    """∂loss/∂logp and ∂loss/∂entropy of every token of every batch."""
    fields = _Fields.of(world, outcomes)
    logp, entropy = fields.logp[rows].requires_grad_(), fields.entropy[rows].requires_grad_()
    group = torch.arange(world.setting.prompts).repeat_interleave(world.setting.group_size)
    cuts = torch.arange(len(group)).tensor_split(world.setting.cuts)

    def of_batch(rows: Tensor, logp: Tensor, entropy: Tensor) -> Tensor:
        batch = fields.batch(rows, group)
        prepared = loss.prepare(batch, world.setting.max_tokens)
        counts = loss.counts(batch, prepared, 1)
        shares = [loss.loss(logp[cut], entropy[cut], batch.rows(cut), prepared.rows(cut), counts) for cut in cuts if len(cut)]
        return torch.stack(shares).sum()

    total = _over_batches(of_batch, rows, logp, entropy).sum()
    return torch.autograd.grad(total, (logp, entropy), allow_unused=True, materialize_grads=True)


def _over_batches(of_batch, rows: Tensor, *inputs: Tensor) -> Float[Tensor, " M"]:
    """All batches at once; a loss that branches on its values is taken batch by batch, which is why there may be fewer."""
    try:
        return torch.vmap(of_batch)(rows, *inputs)
    except RuntimeError as refused:
        if "vmap" not in str(refused):
            raise
        if len(rows) > LARGEST_ONE_BY_ONE:
            raise KeelError(
                f"This loss branches on values, so {len(rows):,} batches would be taken one by one. Expected at most "
                f"{LARGEST_ONE_BY_ONE:,} of them, or a loss of tensor operations alone (torch.where in place of if)."
            ) from refused
    return torch.stack([of_batch(*row) for row in zip(rows, *inputs, strict=True)])


@dataclass(frozen=True)
class _Fields:
    """What a batch is put together from: one row for each outcome."""

    world: World
    outcomes: Outcomes
    logp: Float[Tensor, "R T"]
    old: Float[Tensor, "R T"]
    sampler: Float[Tensor, "R T"]
    ref: Float[Tensor, "R T"]
    entropy: Float[Tensor, "R T"]

    @classmethod
    def of(cls, world: World, outcomes: Outcomes) -> _Fields:
        pick = (outcomes.prompt, outcomes.completion)
        logp, old, sampler, ref = (world.tree.of_tokens(t)[pick] for t in (world.now, world.old, world.sampler, world.ref))
        return cls(world, outcomes, logp, old, sampler, ref, _node_entropy(world, world.theta)[pick])

    def batch(self, rows: Int[Tensor, " B"], group: Int[Tensor, " B"]) -> Batch:
        tree, completion = self.world.tree, self.outcomes.completion[rows]
        tokens = tree.tokens[completion]
        return Batch(
            tokens=torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1),
            prompt_len=torch.ones_like(completion),
            completion_len=tree.lengths[completion],
            mask=tree.mask[completion],
            logp_rollout=self.sampler[rows],
            group=group,
            reward=self.outcomes.reward[rows],
            scorable=torch.ones_like(completion, dtype=torch.bool),
            correct=self.outcomes.correct[rows],
            truncated=tree.truncated[completion],
            versions=torch.zeros_like(tokens),
            logp_old=self.old[rows],
            logp_ref=self.ref[rows],
        )


def _node_entropy(world: World, theta: Tensor) -> Float[Tensor, "P N T"]:
    table = world.policy(theta)
    of_node = -torch.where(table.isfinite(), table.exp() * table, 0.0).sum(-1)
    return torch.where(world.tree.mask, of_node[:, world.tree.node], 0.0)


@dataclass(frozen=True)
class _Slope:
    """∂logp/∂θ and ∂entropy/∂θ of every token of every completion: [P · N · T, D]."""

    logp: Float[Tensor, "PNT D"]
    entropy: Float[Tensor, "PNT D"]
    tokens: int

    @classmethod
    def of(cls, world: World) -> _Slope:
        def both(theta: Tensor) -> Tensor:
            return torch.stack([world.tree.of_tokens(world.policy(theta)), _node_entropy(world, theta)])

        slopes = torch.autograd.functional.jacobian(both, world.theta, vectorize=True).flatten(1, 3)
        return cls(slopes[0], slopes[1], world.tree.mask.shape[1])

    def of_batches(self, by_logp: Tensor, by_entropy: Tensor, place: Int[Tensor, "M B"]) -> Float[Tensor, "M D"]:
        """Gradient of each batch from those of its tokens."""
        cells = (place[..., None] * self.tokens + torch.arange(self.tokens)).flatten(1)
        total = torch.zeros(len(place), self.logp.shape[1], dtype=self.logp.dtype)
        for slope, weights in ((self.logp, by_logp), (self.entropy, by_entropy)):
            spread = torch.zeros(len(place), len(slope), dtype=slope.dtype).scatter_add(1, cells, weights.flatten(1))
            total += spread @ slope
        return total
