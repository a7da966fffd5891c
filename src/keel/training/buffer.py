"""Where prompts come from, and how a full batch of groups is collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from keel.config import RunConfig
from keel.data.curriculum import Record, draw, weights
from keel.errors import KeelError
from keel.training.ranks import ALONE, Ranks
from keel.types import Completion, Finish, Group, Prompt, Score

Reward = Callable[[Prompt, str, Finish], Score]
Asked = tuple[Prompt, str, Finish]
RewardMany = Callable[[Sequence[Asked]], list[Score]]
Generate = Callable[[Sequence[Prompt]], tuple[list[Prompt], list[Completion]]]


class PromptStream:
    """Training prompts in a seeded order, epoch after epoch. Its whole state is how many were taken.

    Args:
        prompts: the training split.
        seed: of the order; each epoch is another permutation.
        taken: prompts consumed so far (when resuming).
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, taken: int = 0):
        if not prompts:
            raise KeelError("The task has no training prompts. Expected at least one; check the task's name and its filters.")
        self.prompts, self.seed, self.taken = prompts, seed, taken
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts. A prompt's id carries its epoch from the second on, so that a repeat is another instance."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        epoch, place = divmod(self.taken, len(self.prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        self.taken += 1
        prompt = self.prompts[self._order[place]]
        return prompt if epoch == 0 else prompt.again(epoch)

    def learn(self, groups: Sequence[Group]) -> None:
        """Hear what came of prompts that were taken; this order does not depend on it."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides `taken`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint."""


class CurriculumStream(PromptStream):
    """Training prompts by their pass rates so far: more often those where right and wrong answers are both likely.

    A quarter of the draws is spread over all prompts alike. Within one round no prompt comes twice. What is maximised is Σ w·J_p,
    with weights that follow the policy, and not the mean over prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, taken: int = 0):
        super().__init__(prompts, seed, taken)
        self.record, self._asked = Record.empty(len(prompts)), {}

    def take(self, count: int) -> list[Prompt]:
        index = draw(weights(self.record), count, self.seed, self.taken)
        found = [self.prompts[i].again(self.taken + n) for n, i in enumerate(index.tolist())]
        self._asked = {prompt.id: i for prompt, i in zip(found, index.tolist(), strict=True)}
        self.taken += count
        return found

    def learn(self, groups: Sequence[Group]) -> None:
        """Count right answers among the scorable ones."""
        scored = [[score.correct for score in group.scores if score.scorable] for group in groups]
        index = np.array([self._asked[group.prompt.id] for group in groups], dtype=np.int64)
        right, tries = (np.array([f(found) for found in scored], dtype=np.float64) for f in (sum, len))
        self.record = self.record.updated(index, right, tries)

    def state(self) -> dict[str, Tensor]:
        return {"right": torch.from_numpy(self.record.right), "tries": torch.from_numpy(self.record.tries)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.record = Record(state["right"].numpy().copy(), state["tries"].numpy().copy())


STREAMS: dict[str, type[PromptStream]] = {"none": PromptStream, "pass_rate": CurriculumStream}


@dataclass(frozen=True)
class Collected:
    """Groups for one batch, and what it took to get them.

    Args:
        spent: what the grader has used up since the run began.
        told: what else there is to say of how they came, by the names of metrics.
    """

    groups: list[Group]
    generated_tokens: int
    dropped: int
    spent: Mapping[str, float] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)


def score_group(prompt: Prompt, completions: Sequence[Completion], reward: Reward) -> Group:
    """`score_groups` of one prompt."""
    return score_groups([(prompt, completions)], one_by_one(reward))[0]


def score_groups(answered: Sequence[tuple[Prompt, Sequence[Completion]]], reward_many: RewardMany) -> list[Group]:
    """Grade all completions of all prompts at once. What the engine failed on is unscorable; so is a reward that is not finite."""
    rows = [(prompt, c) for prompt, completions in answered for c in completions]
    asked = [(prompt, c.text, c.finish) for prompt, c in rows if c.finish != "error"]
    scores = reward_many(asked)
    if len(scores) != len(asked):
        raise KeelError(f"The task gave {len(scores)} scores for {len(asked)} completions. Expected one each, in their order.")
    graded = iter(scores)
    told = iter([Score(None, reason=f"engine: {c.error}") if c.finish == "error" else _finite(next(graded)) for _, c in rows])
    return [Group(prompt, tuple(completions), tuple(islice(told, len(completions)))) for prompt, completions in answered]


def one_by_one(reward: Reward) -> RewardMany:
    """A reward of one completion as a reward of many."""
    return lambda asked: [reward(prompt, text, finish) for prompt, text, finish in asked]


def _finite(score: Score) -> Score:
    if score.value is not None and not np.isfinite(score.value):
        return Score(None, reason=f"reward: {score.value} is not a finite number")
    return score


def collect(
    generate: Generate,
    stream: PromptStream,
    reward: Reward,
    *,
    prompts: int,
    reward_many: RewardMany | None = None,
    live_only: bool = False,
    max_rounds: int = 10,
    ranks: Ranks = ALONE,
) -> Collected:
    """Sample and grade groups until `prompts` of them are in hand.

    Args:
        generate: prompts → the prompts as rendered, and all their completions.
        reward_many: grades a whole round at once, in place of `reward`.
        live_only: dynamic sampling (DAPO, arXiv 2503.14476): keep only groups with right and wrong answers, judged by accuracy and
            never by the shaped reward, and sample on until the batch is full.
        max_rounds: rounds of sampling after which it gives up.
        ranks: each samples and grades a share of every round's prompts, and all get all groups.

    Raises:
        KeelError: the batch is not full after `max_rounds`, or every completion was unscorable.
    """

    def groups_of(taken: Sequence[Prompt]) -> list[Group]:
        return score_groups(by_prompt(*generate(taken)), reward_many or one_by_one(reward))

    return fill(Filling(prompts, live_only, max_rounds), stream, ranks.spread(groups_of))


@dataclass
class Filling:
    """A batch on its way.

    Args:
        prompts: groups that make it full.
        live_only: keep only groups with right and wrong answers.
        max_rounds: rounds of sampling after which it is given up.
    """

    prompts: int
    live_only: bool = False
    max_rounds: int = 10
    kept: list[Group] = field(default_factory=list)
    rounds: int = 0
    tokens: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, config: RunConfig, live_only: bool, updates_per_batch: int) -> Filling:
        """As a run's settings have it."""
        return cls(config.train.prompts_per_step * updates_per_batch, live_only, config.train.dynamic_sampling_max_rounds)

    def add(self, groups: Sequence[Group]) -> Collected | None:
        """Take a round's groups; the batch, if it is full now.

        Raises:
            KeelError: it is not after its last round, or nothing in this one could be scored.
        """
        _refuse_all_unscorable(groups)
        fresh = [group for group in groups if group.live] if self.live_only else groups
        self.tokens += sum(len(c.token_ids) for group in groups for c in group.completions)
        self.dropped += len(groups) - len(fresh)
        self.kept += fresh
        self.rounds += 1
        if len(self.kept) >= self.prompts:
            return Collected(self.kept[: self.prompts], self.tokens, self.dropped + len(self.kept) - self.prompts)
        if self.rounds >= self.max_rounds:
            self._give_up()
        return None

    def _give_up(self) -> NoReturn:
        raise KeelError(
            f"Dynamic sampling found {len(self.kept)} live groups (right and wrong answers in one group) among "
            f"{self.max_rounds * self.prompts} prompts, and {self.prompts} are needed. Expected a share of 1 − p^G − (1−p)^G of "
            "them. Take easier or harder prompts, a larger train.group_size, a larger train.dynamic_sampling_max_rounds, or set "
            "train.dynamic_sampling = false."
        )


def fill(filling: Filling, stream: PromptStream, groups_of: Callable[[list[Prompt]], list[Group]]) -> Collected:
    """Rounds of sampling, one after another, until the batch is full."""
    while True:
        groups = groups_of(stream.take(filling.prompts))
        found = filling.add(groups)
        stream.learn(groups)
        if found is not None:
            return found


def by_prompt(asked: Sequence[Prompt], completions: Sequence[Completion]) -> list[tuple[Prompt, list[Completion]]]:
    """Each prompt with its completions."""
    found: dict[str, list[Completion]] = {prompt.id: [] for prompt in asked}
    for completion in completions:
        found[completion.prompt_id].append(completion)
    return [(prompt, found[prompt.id]) for prompt in asked]


def _refuse_all_unscorable(groups: Sequence[Group]) -> None:
    scores = [score for group in groups for score in group.scores]
    if not any(score.scorable for score in scores):
        raise KeelError(
            f"None of {len(scores)} completions could be scored; the first reason was: {scores[0].reason}. Expected finite "
            "rewards. Mend the reward or the engine; an unscorable completion is never counted as a wrong one."
        )
