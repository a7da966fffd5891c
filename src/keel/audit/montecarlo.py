"""What estimators estimate on a real policy, by sampling: gradient against gradient, on the same completions.

Groups are sampled once. Every objective then takes its own step on each of them, through the path that trains (`prepare`, `counts`,
`loss`, `Policy.logp`), and only a projection of the gradient is kept. Means are compared without their noise floor (`jackknife`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.audit.comparison import MonteCarlo, Sampled
from keel.audit.projection import Projection
from keel.errors import KeelError, nearest
from keel.exact.expectation import Loss
from keel.models.policy import Policy, TokenLogp
from keel.objectives.signals import Prepared, keep
from keel.progress import Display, Silent
from keel.rollout.engine import Engine, Seed, check_completions
from keel.tasks.task import Task
from keel.training.batch import batch_from_groups, micro_batches
from keel.training.buffer import PromptStream, collect
from keel.training.step import log_probabilities
from keel.types import Batch, Completion, Group, Prompt, Sampling, StepCounts

AUDIT = 2**31 + 1  # the step that audits draw under: never training's, never an evaluation's
AT_ONCE = 64  # groups that are sampled, and held in memory, together
SMALL = 5_000_000  # parameters below which a step is computed by one thread
FEWEST = 8  # steps below which no interval means anything


def measure(
    policy: Policy,
    task: Task,
    objectives: Mapping[str, Loss],
    *,
    groups: int,
    group_size: int = 8,
    sampling: Sampling | None = None,
    seed: int = 0,
    sampler: Policy | None = None,
    reference: Policy | None = None,
    against: str | None = None,
    projection: int = 4096,
    groups_per_step: int = 1,
    micro_batch_tokens: int | None = 16384,
    display: Display | None = None,
) -> MonteCarlo:
    """The gradients of several objectives on the same groups, compared.

    Args:
        policy: the gradients are taken in its parameters, at its weights.
        objectives: by name; all are compared with one of them.
        groups: sampled, of `group_size` completions each.
        sampling: temperature 1 and at most 48 tokens unless given.
        seed: of prompts, completions and the projection.
        sampler: the weights that sample, if they are not the policy's own (staleness); logp_old is theirs.
        reference: what KL terms compare with; the policy itself, held fixed, unless given.
        against: name of the objective that the others are compared with; the last unless given.
        projection: numbers that are kept of each gradient.
        groups_per_step: groups of one step; raise it for objectives whose baseline or scale is the batch's.
        micro_batch_tokens: as in training; changes memory, never a gradient.
        display: shown `groups` steps.

    Raises:
        KeelError: too few steps, an unknown `against`, nothing could be scored, or a gradient that is not finite.
    """
    against = _refuse(objectives, against, groups, groups_per_step)
    begun, display = time.perf_counter(), display or Silent()
    sampling = sampling or Sampling(max_completion_tokens=48)
    parameters = policy.parameters()
    project = Projection(parameters, projection, seed)
    stepper = _Stepper(policy, objectives, project, sampling, sampler, reference, micro_batch_tokens)
    kept: dict[str, list[Tensor]] = {name: [] for name in objectives}
    tally = _Tally()
    with _few_threads(project.parameters):
        for part in sample_groups(sampler or policy, task, sampling, seed, groups, group_size, groups_per_step):
            for start in range(0, len(part), groups_per_step):
                step = part[start : start + groups_per_step]
                for name, gradient in stepper(step, tally).items():
                    kept[name].append(gradient)
                tally.count(step)
                display.show(tally.groups, {"reward/mean": tally.accuracy})
    told = tally.told(
        model=policy.name,
        task=task.name,
        group_size=group_size,
        groups_per_step=groups_per_step,
        seed=seed,
        parameters=project.parameters,
        projection=project.size,
        projection_error=project.error,
        seconds=time.perf_counter() - begun,
    )
    return MonteCarlo(told, {name: torch.stack(rows) for name, rows in kept.items()}, against)


def audit_model(
    names: Sequence[str],
    model: str,
    task: str,
    groups: int,
    group_size: int = 8,
    seed: int = 0,
    *,
    objectives: Mapping[str, Loss],
    sampling: Sampling | None = None,
    against: str | None = None,
    drift: float = 0.0,
    stale_steps: int = 0,
    lr: float = 1e-4,
    projection: int = 4096,
    groups_per_step: int = 1,
    display: Display | None = None,
) -> MonteCarlo:
    """`measure` by names: loads the model and the task, and moves the policy away where that is asked for.

    The loaded weights are the reference. `drift` moves the policy off them before it samples; `stale_steps` trains it on between
    sampling and the gradients.

    Args:
        names: of the objectives, as `objectives` knows them; the last is what the others are compared with.
        drift: random step of every weight, relative to the root mean square of its tensor.
        stale_steps, lr: optimizer steps of the solid baseline, and their learning rate.

    Raises:
        KeelError: an unknown name, and whatever loading and `measure` refuse.
    """
    from keel.models.load import load_policy
    from keel.tasks.task import get_task

    for name in names:
        if name not in objectives:
            known = ", ".join(sorted(objectives))
            raise KeelError(f"No objective is named {name!r}; {nearest(name, objectives)}Expected one of: {known}.")
    loaded, asked = load_policy(model), get_task(task)
    sampling = sampling or Sampling(max_completion_tokens=48)
    sampler = perturbed(loaded, drift, seed) if drift else loaded
    policy = trained_on(sampler, asked, stale_steps, lr, sampling, group_size, seed + 1) if stale_steps else sampler
    return measure(
        policy,
        asked,
        {name: objectives[name] for name in names},
        groups=groups,
        group_size=group_size,
        sampling=sampling,
        seed=seed,
        sampler=sampler if stale_steps else None,
        reference=loaded if drift or stale_steps else None,
        against=against,
        projection=projection,
        groups_per_step=groups_per_step,
        display=display,
    )


def perturbed(policy: Policy, relative: float, seed: int = 0) -> Policy:
    """A copy whose weights have taken a random step, relative to the root mean square of each tensor."""
    twin = _twin(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters().values():
            step = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += relative * parameter.square().mean().sqrt() * step
    return twin


def trained_on(policy: Policy, task: Task, steps: int, lr: float, sampling: Sampling, group_size: int, seed: int = 0) -> Policy:
    """A copy that has taken so many optimizer steps of the solid baseline, 16 prompts each."""
    from keel.config import RunConfig
    from keel.objectives.recipes import recipe
    from keel.rollout.local import LocalEngine
    from keel.training.loop import Trainer, iterate

    twin = _twin(policy)
    train = {"lr": lr, "group_size": group_size, "prompts_per_step": 16, "probe_every": 0}
    config = RunConfig(steps=steps, seed=seed, train=train, sampling=vars(sampling))
    for _ in iterate(Trainer(twin, LocalEngine(twin), task, recipe("solid"), config)):
        pass
    return twin


@contextmanager
def _few_threads(parameters: int) -> Iterator[None]:
    """One thread inside for a small model: steps on single groups are too short to share, and waiting for each other costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _twin(policy: Policy) -> Policy:
    """A copy that trains what the policy trains."""
    return policy.over(copy.deepcopy(policy.model))


@dataclass(frozen=True)
class _Stepper:
    """Groups → the update direction of each objective's step on them, projected."""

    policy: Policy
    objectives: Mapping[str, Loss]
    project: Projection
    sampling: Sampling
    sampler: Policy | None
    reference: Policy | None
    micro_batch_tokens: int | None

    def __call__(self, groups: Sequence[Group], tally: _Tally) -> dict[str, Float[Tensor, " size"]]:
        batch = batch_from_groups(groups).to(self.policy.device)
        cuts = micro_batches(batch, self.micro_batch_tokens)
        batch = self._known_before(batch, cuts)
        cap = self.sampling.max_completion_tokens
        prepared = {name: objective.prepare(batch, cap) for name, objective in self.objectives.items()}
        counts = {name: objective.counts(batch, prepared[name], cap) for name, objective in self.objectives.items()}
        total = {name: torch.zeros(self.project.size, dtype=torch.float64) for name in self.objectives}
        for rows in cuts:
            part = batch.rows(rows)
            seen = self.policy.logp(part, temperature=self.sampling.temperature)
            tally.far(part, seen.logp.detach())
            slopes = {
                name: _slopes(objective, seen, part, prepared[name].rows(rows), counts[name])
                for name, objective in self.objectives.items()
            }
            for name, gradient in self._backward(seen, slopes):
                total[name] -= _finite(name, gradient, self.project(gradient))
        return total

    def _known_before(self, batch: Batch, cuts: Sequence[Tensor]) -> Batch:
        """The log-probabilities that some objective needs besides the policy's own."""
        needs = frozenset().union(*(getattr(o, "needs", ("logp_old", "logp_ref")) for o in self.objectives.values()))
        if self.sampler is not None or "logp_old" in needs:
            batch = replace(batch, logp_old=self._scored(self.sampler, batch, cuts))
        if "logp_ref" in needs:
            batch = replace(batch, logp_ref=self._scored(self.reference, batch, cuts))
        return batch

    def _scored(self, policy: Policy | None, batch: Batch, cuts: Sequence[Tensor]) -> Float[Tensor, "B T"]:
        return log_probabilities(policy or self.policy, batch, cuts, self.sampling.temperature)

    def _backward(self, seen: TokenLogp, slopes: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The gradient of every objective that has one, all through the same forward pass."""
        parameters = self.policy.parameters()
        live = {name: pair for name, pair in slopes.items() if any(bool(slope.any()) for slope in pair)}
        for left, (name, pair) in zip(reversed(range(len(live))), live.items(), strict=True):
            gradient = torch.autograd.grad(
                (seen.logp, seen.entropy),
                tuple(parameters.values()),
                pair,
                retain_graph=left > 0,
                allow_unused=True,
                materialize_grads=True,
            )
            named = dict(zip(parameters, gradient, strict=True))
            yield name, named


def _finite(name: str, gradient: Mapping[str, Tensor], projected: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    if not bool(projected.isfinite().all()):
        culprit = next(key for key, g in gradient.items() if not bool(g.isfinite().all()))
        raise KeelError(
            f"{name!r}: its gradient of {culprit!r} is not finite. Expected finite numbers; look for an overflowing ratio or a "
            "division by zero in the loss."
        )
    return projected


def _slopes(
    objective: Loss, seen: TokenLogp, batch: Batch, prepared: Prepared, counts: StepCounts
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """∂loss/∂logp and ∂loss/∂entropy of each token."""
    logp, entropy = seen.logp.detach().requires_grad_(), seen.entropy.detach().requires_grad_()
    loss = objective.loss(logp, entropy, batch, prepared, counts)
    if not loss.requires_grad:
        return torch.zeros_like(seen.logp), torch.zeros_like(seen.entropy)
    return torch.autograd.grad(loss, (logp, entropy), allow_unused=True, materialize_grads=True)


def sample_groups(
    policy: Policy, task: Task, sampling: Sampling, seed: int, groups: int, group_size: int, groups_per_step: int
) -> Iterator[list[Group]]:
    """Groups in parts of a few whole steps; together `groups` of them, or the last whole step before."""
    from keel.rollout.local import LocalEngine

    engine, stream = LocalEngine(policy), PromptStream(task.train, seed)
    left, part = groups // groups_per_step * groups_per_step, max(1, AT_ONCE // groups_per_step) * groups_per_step

    def generate(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Completion]]:
        return _completed(engine, policy, prompts, sampling, Seed(seed, AUDIT), group_size)

    while left > 0:
        collected = collect(generate, stream, task.reward, prompts=min(part, left))
        left -= len(collected.groups)
        yield collected.groups


def _completed(
    engine: Engine, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, seed: Seed, group_size: int
) -> tuple[list[Prompt], list[Completion]]:
    asked = [policy.template.render(prompt, policy.tokenizer) for prompt in prompts]
    completions = engine.generate(asked, sampling, seed, group_size)
    vocab_size = policy.base.get_output_embeddings().weight.shape[0]
    check_completions(
        asked, completions, group_size, sampling, end_ids=policy.end_ids, vocab_size=vocab_size, version=engine.version
    )
    return asked, completions


@dataclass
class _Tally:
    """Sums over everything that was sampled."""

    groups: int = 0
    live: int = 0
    completions: int = 0
    right: int = 0
    tokens: int = 0
    nats: dict[str, float] = field(default_factory=lambda: {"staleness": 0.0, "from_reference": 0.0})

    @property
    def accuracy(self) -> float:
        return self.right / self.completions if self.completions else math.nan

    def count(self, groups: Sequence[Group]) -> None:
        scores = [score for group in groups for score in group.scores if score.scorable]
        self.groups += len(groups)
        self.live += sum(group.live for group in groups)
        self.completions += len(scores)
        self.right += sum(score.correct for score in scores)

    def far(self, batch: Batch, logp: Float[Tensor, "B T"]) -> None:
        """Add the absolute differences of log-probabilities, in nats."""
        self.tokens += int(batch.mask.sum())
        for name, other in (("staleness", batch.logp_old), ("from_reference", batch.logp_ref)):
            if other is not None:
                self.nats[name] += float(keep((logp - other).abs(), batch.mask).sum())

    def told(self, **settings: Any) -> Sampled:
        """What was sampled, under these settings."""
        tokens = max(1, self.tokens)
        return Sampled(
            groups=self.groups,
            accuracy=self.accuracy,
            live=self.live / self.groups,
            length=self.tokens / max(1, self.completions),
            staleness=self.nats["staleness"] / tokens,
            from_reference=self.nats["from_reference"] / tokens,
            **settings,
        )


def _refuse(objectives: Mapping[str, Loss], against: str | None, groups: int, groups_per_step: int) -> str:
    """What the others are compared with, if all of it makes sense."""
    if not objectives:
        raise KeelError("There is no objective to measure. Expected at least one; name a recipe, or two to compare them.")
    against = list(objectives)[-1] if against is None else against
    if against not in objectives:
        known = ", ".join(objectives)
        raise KeelError(f"against={against!r} is not among the objectives; {nearest(against, objectives)}Expected one of: {known}.")
    if groups_per_step < 1 or groups // groups_per_step < FEWEST:
        raise KeelError(
            f"{groups} groups with {groups_per_step} a step make {groups // max(1, groups_per_step)} steps. Expected at least "
            f"{FEWEST}, below which no interval means anything. Take more groups; a few hundred say something."
        )
    return against
