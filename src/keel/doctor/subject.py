"""Who is examined: model, task, reward, engine and recipe, put together as training puts them together, only with smaller batches.

Probes go through the trainer's own functions (`keel.training.loop`), found by name at the moment of the call: whatever stands in
their place in this process is what is examined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel import parts as parts_of
from keel.config import RunConfig
from keel.doctor.finding import Check
from keel.models.policy import Policy
from keel.objectives.objective import Objective, Prepared
from keel.rollout.engine import Seed, check_completions
from keel.run_folder import RunFolder
from keel.tasks import task as tasks
from keel.training import loop
from keel.training.rollouts import InTurn
from keel.training.step import look
from keel.types import Batch, Completion, Group, Prompt, Sampling, Score

PROMPTS, GROUP = 8, 8  # at most, in a batch that is examined
LARGE, FEW_PROMPTS, FEW = 2e7, 2, 3  # parameters from which it is smaller yet
ALIKE = "in no group there are two different completions, so no weight can matter"  # to rewards
STEP = 2**31 + 3  # draws of the doctor's own: never training's, an evaluation's, an audit's or a gap's


@dataclass
class Subject:
    """A run that has not begun, or that is taken up at a checkpoint.

    Args:
        parts: as the settings name them.
        trainer: over the same parts, with batches of at most `PROMPTS` × `GROUP`, sampled in turn.
        facts: what one probe found out and others build on, by name.
        fresh: whether the engine is awake and was sent the weights as they are.
    """

    parts: parts_of.Parts
    trainer: loop.Trainer
    facts: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False

    @classmethod
    def of(cls, config: RunConfig, make_engine: parts_of.MakeEngine | None = None) -> Subject:
        """Of settings. The task is not checked on load, so that what is wrong with it can be found.

        Raises:
            KeelError: they cannot be put together.
        """
        plain = config.resolved().replaced({"evaluation.panel": ()})
        return cls._over(parts_of.assemble(plain, make_engine=make_engine, find_task=tasks.unchecked_task))

    @classmethod
    def of_run(cls, path: str | Path, step: int | None = None) -> Subject:
        """Of a run folder: its settings, and the weights of its newest checkpoint, or that of one step.

        Raises:
            KeelError: it is no run folder, or has no such checkpoint.
        """
        folder = RunFolder.open(path)
        config = folder.config.replaced({"evaluation.panel": ()})
        policy = parts_of.trained_policy(folder, step)
        return cls._over(parts_of.assemble(config, policy, find_task=tasks.unchecked_task))

    @classmethod
    def _over(cls, parts: parts_of.Parts) -> Subject:
        train = parts.config.train
        large = is_large(parts.policy)
        updates = min(2, train.updates_per_batch or 1)
        smaller = {
            "train.updates_per_batch": updates,
            "train.prompts_per_step": min((FEW_PROMPTS if large else PROMPTS) // updates, train.prompts_per_step),
            "train.group_size": min(FEW if large else GROUP, train.group_size),
            "train.max_staleness": 0,
            "train.partial_rollouts": False,
            "train.dynamic_sampling": False,
            "train.curriculum": "none",
            **{"cluster.ray": "", "cluster.rollout_workers": 1, "cluster.train_workers": 0},
        }
        trainer = loop.Trainer(parts.policy, parts.engine, parts.task, parts.recipe, parts.config.replaced(smaller))
        return cls(parts, trainer)

    @property
    def config(self) -> RunConfig:
        """The settings as they were given."""
        return self.parts.config

    @property
    def policy(self):
        return self.parts.policy

    @property
    def task(self):
        return self.parts.task

    @property
    def sampling(self) -> Sampling:
        return self.trainer.sampling

    @property
    def cap(self) -> int:
        return self.sampling.max_completion_tokens

    def blocked(self, name: str, *by: str) -> Check | None:
        """The check that cannot be made because of what an earlier probe found; None where nothing stands in its way.

        Args:
            by: what it builds on: "forward", that log-probabilities are right, "gradient", that one batch has one gradient, or
                "advantage", that rewards reach their rows.
        """
        why = next((self.facts[f"no {what}"] for what in by if f"no {what}" in self.facts), "")
        return Check(name, "", skipped=why) if why else None

    def block(self, what: str, why: str) -> None:
        """From here on nothing can be built on `what`; the first reason counts."""
        self.facts.setdefault(f"no {what}", why)

    def close(self) -> None:
        """End what works in the background."""
        self.trainer.close()
        getattr(self.parts.engine, "close", lambda: None)()

    @property
    def large(self) -> bool:
        """Whether a pass takes so long that probes make do with fewer of them."""
        return is_large(self.policy)

    # ── sampling ──

    def awake(self) -> None:
        """Send the engine the trainer's weights as training sends them, unless it has them."""
        if not self.fresh:
            self.trainer.rollouts.publish(self.policy.weights(), self.trainer.step)
            self.fresh = True

    def rendered(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """As the model reads them."""
        return [self.policy.template.render(prompt, self.policy.tokenizer) for prompt in prompts]

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling | None = None, step: int = STEP
    ) -> list[Completion]:
        """Completions of rendered prompts, as the engine gives them, held to its contract.

        Raises:
            KeelError: the engine broke its contract.
        """
        sampling, engine = sampling or self.sampling, self.parts.engine
        made = engine.generate(prompts, sampling, Seed(self.config.seed, step), group_size)
        vocab_size = self.policy.base.get_output_embeddings().weight.shape[0]
        rules = dict(end_ids=self.policy.end_ids, vocab_size=vocab_size, version=engine.version)
        check_completions(prompts, made, group_size, sampling, **rules)
        return made

    @cached_property
    def groups(self) -> list[Group]:
        """One rollout batch, sampled and graded by training's own collection; the engine is awake afterwards."""
        self.awake()
        collected = self.rollouts.collect(0)
        self.fresh = False  # it sleeps
        return list(collected.groups)

    @property
    def rollouts(self) -> InTurn:
        return self.trainer.rollouts  # sampled in turn, whatever the settings say

    # ── a batch to compute on ──

    @cached_property
    def batch(self) -> Batch:
        """The groups as training makes a batch of them, with rewards of the doctor's own: in every group right and wrong ones, and
        a few completions that could not be scored, so that every path of the objective is walked whatever the policy can do.
        """
        marked = [replace(group, scores=_scores(len(group.scores), place)) for place, group in enumerate(self.groups)]
        return loop._with_log_probabilities(self.trainer, loop.batch_from_groups(marked))

    @cached_property
    def stale(self) -> Batch:
        """The same batch as if the policy had moved since, and the engine computed otherwise: no ratio is 1."""
        generator, batch = torch.Generator().manual_seed(self.config.seed), self.batch

        def near(value: Tensor | None, scale: float) -> Tensor:
            start = self.seen.to(batch.logp_rollout.dtype) if value is None else value
            return start + scale * torch.randn(start.shape, generator=generator).to(start)

        reference = None if batch.logp_ref is None else near(batch.logp_ref, 0.1)
        moved = dict(logp_old=near(batch.logp_old, 0.05), logp_rollout=near(batch.logp_rollout, 0.05), logp_ref=reference)
        return replace(batch, **moved)

    @cached_property
    def seen(self) -> Float[Tensor, "B T"]:
        """What the trainer says of the batch."""
        return self.look(self.batch)

    def look(self, batch: Batch, cuts: Sequence[Tensor] | None = None, temperature: float | None = None) -> Float[Tensor, "B T"]:
        """The trainer's log-probabilities in nats, in one piece unless cut."""
        cuts = [torch.arange(len(batch))] if cuts is None else cuts
        return look(self.policy, batch, cuts, self.sampling.temperature if temperature is None else temperature).logp

    # ── the real step ──

    def gradient(
        self,
        batch: Batch,
        prepared: Prepared | None = None,
        micro_batch_tokens: int | None = None,
        objective: Objective | None = None,
    ) -> Step:
        """One optimizer step through the trainer's own update, up to the moment at which weights would change.

        Args:
            objective: in place of the recipe's.
        """
        trainer, held = self.trainer, (self.trainer.optimizer, self.trainer.config, self.trainer.objective)
        clocks = {name: getattr(trainer, name) for name in ("step", "updates", "skipped")}
        parameters = trainer.parameters
        trainer.optimizer = recorder = _Recorder(parameters)
        trainer.config = held[1].replaced({"train.micro_batch_tokens": micro_batch_tokens, "train.max_grad_norm": None})
        trainer.objective = objective or held[2]
        self.policy.model.zero_grad(set_to_none=True)
        try:
            prepared = trainer.objective.prepare(batch, self.cap) if prepared is None else prepared
            metrics, skipped, _ = loop._update(trainer, batch, prepared)
            left = [name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())]
        finally:
            trainer.optimizer, trainer.config, trainer.objective = held
            for name, value in clocks.items():
                setattr(trainer, name, value)
            self.policy.model.zero_grad(set_to_none=True)
        return Step(recorder.told, metrics, skipped, recorder.steps, left)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens to weights, optimizer and clocks inside is undone at the end, and the engine gets the old weights."""
        trainer = self.trainer
        weights = {name: p.detach().clone() for name, p in self.policy.model.named_parameters()}
        optimizer = {p: dict(state) for p, state in trainer.optimizer.state.items()}
        optimizer = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.items()}
        clocks = {name: getattr(trainer, name) for name in ("step", "updates", "batch", "tokens", "skipped")}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.policy.model.named_parameters():
                    p.copy_(weights[name])
            trainer.optimizer.state.clear()
            trainer.optimizer.state.update(optimizer)
            for name, value in clocks.items():
                setattr(trainer, name, value)
            self.policy.model.zero_grad(set_to_none=True)
            self.fresh = False

    def no_double(self, name: str) -> Check | None:
        """The check that cannot be made because this model has no 64-bit arithmetic (some mixtures); None where it has."""
        if "double" not in self.facts:
            try:
                with self.double():
                    self.look(in_double(self.batch.rows(torch.arange(1))))
                self.facts["double"] = True
            except RuntimeError:
                self.facts["double"] = False
        why = "this model cannot be computed in 64 bits, so rounding cannot be told from a fault"
        return None if self.facts["double"] else Check(name, "", skipped=why)

    @contextmanager
    def double(self) -> Iterator[None]:
        """Inside, the policy computes in 64 bits, where rounding is far below anything that is looked for; weights come back bit
        for bit.
        """
        kinds = {name: p.dtype for name, p in self.policy.model.named_parameters()}
        buffers = {name: b.dtype for name, b in self.policy.model.named_buffers()}
        self.policy.model.double()
        try:
            yield
        finally:
            for name, p in self.policy.model.named_parameters():
                p.data = p.data.to(kinds[name])
            for name, b in self.policy.model.named_buffers():
                b.data = b.data.to(buffers[name])


@dataclass(frozen=True)
class Step:
    """What one update would have done.

    Args:
        gradient: by the parameter's name; None where backward left nothing.
        metrics: that the loop would write.
        skipped: the tensor for which the step was left out; "" = it was not.
        taken: steps that the optimizer was asked for.
        left: tensors that still have a gradient afterwards.
    """

    gradient: dict[str, Tensor | None]
    metrics: dict[str, float]
    skipped: str
    taken: int
    left: list[str]

    @property
    def flat(self) -> Float[Tensor, " n"]:
        """All of it as one vector of 64-bit numbers."""
        parts = [g.double().flatten() for g in self.gradient.values() if g is not None]
        return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)


class _Recorder(torch.optim.Optimizer):
    """An optimizer that notes the gradient and changes nothing."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__(list(parameters.values()), {"lr": 0.0})
        self.parameters, self.told, self.steps = parameters, {name: None for name in parameters}, 0

    def step(self, closure=None):
        self.steps += 1
        self.told = {name: None if p.grad is None else p.grad.detach().clone() for name, p in self.parameters.items()}


def is_large(policy: Policy) -> bool:
    """Whether a model has more parameters than can be asked often in seconds."""
    return sum(p.numel() for p in policy.model.parameters()) > LARGE


def in_double(batch: Batch) -> Batch:
    """The batch with 64-bit numbers."""
    wide = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return replace(batch, **{name: v.double() for name, v in wide.items() if isinstance(v, Tensor) and v.is_floating_point()})


def some_differ(batch: Batch) -> bool:
    """Whether any group has completions that differ; where none does, its gradients cancel out and what is left is rounding."""
    return len(torch.cat((batch.group[:, None], batch.tokens), 1).unique(dim=0)) > len(batch.group.unique())


def apart(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """‖a − b‖ / ‖b‖; infinite where one has what the other lacks, or is not finite."""
    if a.shape != b.shape:
        return float("inf")
    distance = float((a - b).norm() / b.norm().clamp(min=1e-300))
    return distance if distance == distance else float("inf")


def _scores(count: int, place: int) -> tuple[Score, ...]:
    """Right and wrong by turns, in shares that differ from group to group; the last but one of every third group has no verdict."""
    every = 2 + place % 3
    scores = [Score(float(i % every == 0), i % every == 0) for i in range(count)]
    if place % 3 == 0 and count > 3:
        scores[-2] = Score(None, reason="for the examination")
    return tuple(scores)
