"""Where the next batch of groups comes from: sampled now (`InTurn`), or ahead of time by a worker (`ahead.Ahead`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from keel.config import RunConfig
from keel.models.policy import Policy
from keel.rewards.compose import spent
from keel.rollout.engine import Engine, Seed, check_completions
from keel.tasks.task import Task, reward_many
from keel.training.buffer import Collected, Filling, PromptStream, by_prompt, fill, score_groups
from keel.training.ranks import ALONE, Ranks
from keel.types import Group, Prompt


@runtime_checkable
class Rollouts(Protocol):
    """A source of batches, and where new weights go."""

    def collect(self, step: int) -> Collected:
        """The batch that optimizer step `step` (counted from 0) begins with."""
        ...

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """From now on batches may be sampled with these."""
        ...

    def close(self) -> None:
        """End whatever works in the background."""
        ...


@dataclass(frozen=True)
class Sampler:
    """An engine with everything that it takes to fill a batch.

    Args:
        policy: renders prompts, and says what ends a completion; its weights are not looked at.
        dynamic_sampling: whether groups without signal are drawn again.
        updates_per_batch: a batch holds that many times `prompts_per_step` prompts.
        ranks: that sample it together.
    """

    engine: Engine
    policy: Policy
    task: Task
    stream: PromptStream
    config: RunConfig
    dynamic_sampling: bool
    updates_per_batch: int
    ranks: Ranks = ALONE

    def batch(self, step: int) -> Collected:
        """The batch for optimizer step `step`."""
        filling = Filling.of(self.config, self.dynamic_sampling, self.updates_per_batch)
        groups = self.ranks.spread(lambda prompts: self.groups(prompts, step))
        return replace(fill(filling, self.stream, groups), spent=self.ranks.sums(self.spent()))

    def groups(self, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """A group of each prompt, graded, with the draws of step `step`. Completions are checked against the engine's contract."""
        config, policy, sampling = self.config, self.policy, self.config.sampling.distribution()
        asked = [policy.template.render(prompt, policy.tokenizer) for prompt in prompts]
        group_size = config.train.group_size
        completions = self.engine.generate(asked, sampling, Seed(run=config.seed, step=step), group_size)
        version = None if config.train.partial_rollouts else self.engine.version  # else any that came in the middle
        vocab_size = policy.base.get_output_embeddings().weight.shape[0]
        rules = dict(end_ids=policy.end_ids, vocab_size=vocab_size, version=version)
        check_completions(asked, completions, group_size, sampling, **rules)
        return score_groups(by_prompt(asked, completions), partial(reward_many, self.task))

    def spent(self) -> dict[str, float]:
        """What the grader has used up so far."""
        return spent(getattr(self.task, "grade", None))


class InTurn:
    """Sampling and training in turn: every batch comes from the newest weights."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def collect(self, step: int) -> Collected:
        collected = self.sampler.batch(step)
        self.sampler.engine.sleep()
        return collected

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.sampler.engine.load(weights, version)

    def close(self) -> None:
        """Nothing works in the background."""


class OfFirst:
    """Batches that the first of several ranks has from elsewhere, for all of them.

    Args:
        stream: every rank's place in the data.
        begin: what the first rank begins.
    """

    def __init__(self, ranks: Ranks, stream: PromptStream, begin: Callable[[], Rollouts]):
        self.ranks, self.stream, self.own = ranks, stream, None

        def begin_here() -> None:
            self.own = begin()

        ranks.by_first(begin_here)

    def collect(self, step: int) -> Collected:
        collected, self.stream.taken = self.ranks.by_first(lambda: (self.own.collect(step), self.stream.taken))
        return collected

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.ranks.by_first(lambda: self.own.publish(weights, version))

    def close(self) -> None:
        if self.own is not None:
            self.own.close()


def of_first(ranks: Ranks, stream: PromptStream, begin: Callable[[], Rollouts]) -> Rollouts:
    """What `begin` gives, shared where there are several ranks."""
    return begin() if ranks.size == 1 else OfFirst(ranks, stream, begin)


def sampler_of(config: RunConfig, threads: int, taken: int = 0) -> Sampler:
    """A worker's own model, engine and task, from resolved settings alone.

    Args:
        threads: CPU threads that it computes with.
        taken: prompts that were consumed before.
    """
    from keel.models.load import load_policy
    from keel.rollout.engines import engine_of
    from keel.tasks.task import get_task

    torch.set_num_threads(threads)
    task, train = get_task(config.task), config.train
    policy = load_policy(config.model, template=config.template, device=train.device, seed=config.seed)
    stream = PromptStream(task.train, config.seed, taken)
    engine = engine_of(config.engine, policy)
    return Sampler(engine, policy, task, stream, config, bool(train.dynamic_sampling), train.updates_per_batch or 1)
