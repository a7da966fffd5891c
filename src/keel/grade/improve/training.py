"""Training a judge: supervised on examples, then by reinforcement with 1 − |s′ − s|, where the reason it gives must hold too."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from keel.grade.improve.examples import Example
from keel.grade.improve.judge import judgement, question, read, verdict
from keel.grade.improve.solutions import LEVELS, Truth
from keel.models.policy import Policy
from keel.models.pretrain import Schedule, fit
from keel.tasks.task import PromptTask
from keel.types import Prompt, Score

Draw = Callable[[random.Random], Example]


def teach(policy: Policy, draw: Draw, schedule: Schedule, seed: str) -> list[float]:
    """Supervised: the policy's weights are changed in place; returns each step's loss in nats per token."""

    def row(rng: random.Random) -> tuple[str, str]:
        example = draw(rng)
        return question(example.parts, example.text), judgement(example.parts, example.text)

    losses = list(fit(policy.model, row, schedule, seed))
    policy.model.eval()
    return losses


def mixed(fresh: Draw, mined: Sequence[Example], share: float) -> Draw:
    """Examples of two sources: a mined one with that chance, each level alike often, else a fresh one."""
    by_level = [found for level in LEVELS if (found := [example for example in mined if example.truth.level == level])]

    def draw(rng: random.Random) -> Example:
        return rng.choice(rng.choice(by_level)) if mined and rng.random() < share else fresh(rng)

    return draw


def verdict_reward(said: Truth | None, true: Truth) -> float:
    """(1 − |s′ − s|) · m: how near the level is, if the reason holds. 0 for what is no verdict.

    m is the meta-verifier: whether the line that is named is the first wrong one. It is computed here; elsewhere a model is asked.

    Source: DeepSeekMath-V2, arXiv 2511.22570. Differs from it: the meta-verifier is arithmetic, and gives 0 or 1.
    """
    if said is None:
        return 0.0
    return (1.0 - abs(said.level - true.level)) * float(said.step == true.step)


def judging(examples: Sequence[Example], test: Sequence[Example]) -> PromptTask:
    """Judging as a task for reinforcement: one prompt for each example."""

    def prompt(number: int, example: Example) -> Prompt:
        true = verdict(example.truth)
        return Prompt(id=f"judging/{number}", text=question(example.parts, example.text), answer=true)

    def grade(prompt: Prompt, text: str) -> Score:
        said, true = read(text), read(prompt.answer)
        assert true is not None  # as `verdict` wrote it
        return Score(verdict_reward(said, true), said == true)

    train, held_out = (
        [prompt(start + i, example) for i, example in enumerate(found)] for start, found in ((0, examples), (10**6, test))
    )
    return PromptTask("judging", train, held_out, grade, own_gold_only=False)


def save(policy: Policy, folder: Path) -> None:
    """A plain folder that loads as any model does."""
    from keel.models.export import export

    export(policy, folder)
