"""Where the next batch of groups comes from: sampled now (`InTurn`), or ahead of time by a worker (`ahead.Ahead`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from keel.config import RunConfig
from keel.models.policy import Policy
from keel.rewards.compose import spent
from keel.rollout.engine import Engine, Seed, check_completions
from keel.tasks.task import Task, reward_many
from keel.training.buffer import Collected, PromptStream, collect
from keel.training.ranks import ALONE, Ranks
from keel.types import Completion, Prompt


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
        """The batch for optimizer step `step`. Every completion is checked against the engine's contract."""
        config, policy, sampling = self.config, self.policy, self.config.sampling.distribution()
        vocab_size = policy.base.get_output_embeddings().weight.shape[0]

        def generate(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Completion]]:
            asked = [policy.template.render(prompt, policy.tokenizer) for prompt in prompts]
            seed, group_size = Seed(run=config.seed, step=step), config.train.group_size
            completions = self.engine.generate(asked, sampling, seed, group_size)
            version = None if config.train.partial_rollouts else self.engine.version  # else any that came in the middle
            rules = dict(end_ids=policy.end_ids, vocab_size=vocab_size, version=version)
            check_completions(asked, completions, group_size, sampling, **rules)
            return asked, completions

        found = collect(
            generate,
            self.stream,
            self.task.reward,
            prompts=config.train.prompts_per_step * self.updates_per_batch,
            reward_many=partial(reward_many, self.task),
            live_only=self.dynamic_sampling,
            max_rounds=config.train.dynamic_sampling_max_rounds,
            ranks=self.ranks,
        )
        return replace(found, spent=self.ranks.sums(spent(getattr(self.task, "grade", None))))


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
