"""A task whose grader errs on purpose in training, at stated rates; held-out prompts are graded truly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from keel.errors import KeelError
from keel.tasks.task import Task, reward_many, split_number, unchecked_task
from keel.types import Finish, Prompt, Score


@dataclass(frozen=True)
class NoisyTask:
    """Scores of 0 and 1 are exchanged at these rates, each completion by itself, where the prompt is one of training.

    fpr = fnr = .5 is a coin; fpr = fnr = 1 turns the reward round. What is unscorable stays so, and so does a completion that no
    grader sees (truncated or empty: 0).

    Args:
        inner: the task itself.
        fpr: probability that a wrong answer scores 1.
        fnr: probability that a right answer scores 0.
        noise_seed: of the errors; they depend on it, on the prompt's id, the text, and how often that text came before in one call.
    """

    inner: Task
    fpr: float = 0.0
    fnr: float = 0.0
    noise_seed: int = 0

    @property
    def name(self) -> str:
        return f"noisy:{self.inner.name}"

    @property
    def train(self) -> Sequence[Prompt]:
        return self.inner.train

    @property
    def test(self) -> Sequence[Prompt]:
        return self.inner.test

    @cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(prompt.id for prompt in self.test)

    def reward(self, prompt: Prompt, text: str, finish: Finish = "stop") -> Score:
        return self.reward_many([(prompt, text, finish)])[0]

    def reward_many(self, asked: Sequence[tuple[Prompt, str, Finish]]) -> list[Score]:
        """The true scores, some of them exchanged."""
        seen: Counter[tuple[str, str]] = Counter()
        scores = []
        for (prompt, text, finish), score in zip(asked, reward_many(self.inner, asked), strict=True):
            seen[prompt.id, text] += 1
            graded = finish == "stop" and score.scorable and bool(text.strip())
            noisy = graded and prompt.id not in self._held_out
            scores.append(self._exchanged(score, f"{prompt.id} {seen[prompt.id, text]} {text}") if noisy else score)
        return scores

    def _exchanged(self, score: Score, key: str) -> Score:
        if score.value not in (0.0, 1.0):
            raise KeelError(
                f"Task {self.inner.name!r} gave a reward of {score.value:g}. Expected 0 or 1: the errors of a noisy grader are "
                "defined by right and wrong. Make another task noisy."
            )
        chance = split_number(f"noise {self.noise_seed} {key}") / 2.0**64
        if chance >= (self.fnr if score.correct else self.fpr):
            return score
        return replace(score, value=1.0 - score.value, correct=not score.correct, reason="exchanged on purpose")

    def gold(self, prompt: Prompt) -> str:
        return self.inner.gold(prompt)

    def check(self) -> None:
        """Of the task itself: errors on purpose are none of its data's."""
        self.inner.check()


def noisy(variant: str, fpr: float | str = 0.0, fnr: float | str = 0.0, noise_seed: int | str = 0, **options: str) -> NoisyTask:
    """ "noisy:TASK?fpr=.2&fnr=.1": any task with scores of 0 and 1; further options are its own."""
    return NoisyTask(unchecked_task(variant, **options), _rate("fpr", fpr), _rate("fnr", fnr), int(noise_seed))


def _rate(name: str, value: float | str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:
        raise KeelError(f"Task option {name} is {value!r}. Expected a share between 0 and 1.")
    return rate
