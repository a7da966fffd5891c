"""What a judge is trained and measured on: solutions with their computed truth."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keel.grade.improve.judge import parts_of
from keel.grade.improve.solutions import KINDS, LEVELS, Parts, Truth, truth
from keel.models.policy import Policy
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.tasks.problems import SUMS
from keel.types import Prompt, Sampling

FIRST = {"right": 0.4, "far slip": 0.35, "two far slips": 0.25}  # what the first judge is taught: mistakes that leap to the eye


@dataclass(frozen=True)
class Example:
    """A solution and what is true of it.

    Args:
        kind: how it was made: a name of `solutions.KINDS`, or "sampled".
    """

    parts: Parts
    text: str
    kind: str

    @property
    def truth(self) -> Truth:
        return truth(self.parts, self.text)


def drawn(rng: random.Random, shares: Mapping[str, float], terms: int = 3, test: bool = False) -> Example:
    """One solution of a random sum, of a kind drawn by these shares.

    Args:
        test: of a sum that is held out from all training.
    """
    family = SUMS[terms]
    parts = family.draw(rng)
    while family.in_test(parts) != test:
        parts = family.draw(rng)
    [kind] = rng.choices(list(shares), list(shares.values()))
    return Example(parts, KINDS[kind](parts, rng), kind)


def sampled(policy: Policy, prompts: Sequence[Prompt], each: int, seed: Seed) -> list[Example]:
    """What a policy writes to these sums, `each` times."""
    rendered = [policy.template.render(prompt, policy.tokenizer) for prompt in prompts]
    made = LocalEngine(policy).generate(rendered, Sampling(max_completion_tokens=48), seed, each)
    parts = {prompt.id: parts_of(prompt) for prompt in prompts}
    return [Example(parts[c.prompt_id], c.text, "sampled") for c in made if c.finish == "stop"]


def frozen_set(policy: Policy, prompts: Sequence[Prompt], size: int, seed: int = 0) -> list[Example]:
    """Solutions of held-out sums that no step of the loop sees: half of them sampled from a policy, half made, the levels even.

    Args:
        prompts: held-out ones.
        size: examples; a third of each level, as far as there are so many.
    """
    rng = random.Random(f"frozen {seed}")
    made = [drawn(rng, dict.fromkeys(KINDS, 1.0), test=True) for _ in range(4 * size)]
    taken = sampled(policy, prompts, 8, Seed(seed, 2**31 + 4))
    rng.shuffle(taken)
    return [example for source in (taken, made) for example in balanced(source, size // 2)]


def balanced(examples: Iterable[Example], size: int) -> list[Example]:
    """At most `size` different ones, as many of each level as there are of the rarest or a third."""
    by_level: dict[float, list[Example]] = {level: [] for level in LEVELS}
    for example in dict.fromkeys(examples):
        by_level[example.truth.level].append(example)
    share = min(size // len(LEVELS), *(len(found) for found in by_level.values()))
    return [example for found in by_level.values() for example in found[:share]]
