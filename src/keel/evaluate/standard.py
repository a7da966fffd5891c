"""The standard panel: what a model can do besides the task that it is trained on, asked before and after training.

It is small, so that every run can afford it: hundreds of short completions of each skill from a bundled model, some dozen from
a larger one, which takes its time for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from keel.errors import KeelError
from keel.evaluate.suite import evaluate
from keel.models.characters import VOCABULARY
from keel.models.policy import Policy
from keel.rollout.engine import Engine, Seed
from keel.tasks.task import Task, get_task
from keel.training.ranks import ALONE, Ranks
from keel.types import Prompt, Sampling


@dataclass(frozen=True)
class Standard:
    """What models of one kind are asked.

    Args:
        tasks: specs, each without options.
        completions: of each task at most.
        max_completion_tokens: of each completion; right answers are shorter.
    """

    tasks: tuple[str, ...]
    completions: int
    max_completion_tokens: int


OF_CHARACTERS = Standard(
    ("arithmetic:easy", "arithmetic:medium", "arithmetic:hard", "skills:subtract", "skills:sort", "skills:reverse", "skills:max"),
    completions=512,
    max_completion_tokens=48,
)
OF_WORDS = Standard(("sums:1digit", "sums:2digit", "sums:3digit"), completions=48, max_completion_tokens=16)
PROMPTS = 256  # of a task at most; a task that has fewer is asked more often


def standard_of(tokenizer: Any) -> Standard:
    """The bundled models and what is made like them read characters; all others words."""
    return OF_CHARACTERS if tokenizer.get_vocab() == VOCABULARY else OF_WORDS


def standard_panel(
    engine: Engine, policy: Policy, besides: Iterable[str], sampling: Sampling, completions: int, seed: Seed, ranks: Ranks = ALONE
) -> dict[str, dict[str, float]]:
    """What the engine's policy scores on every skill of its standard panel.

    Args:
        policy: says what it can read, and how it is asked.
        besides: specs of tasks that are evaluated anyhow, and left out here.
        sampling: of the run; its cap is lowered to the panel's.
        completions: of each skill at most, if that is fewer than the panel's own.
        ranks: that share the work.

    Returns:
        spec → the numbers of `suite.evaluate`. What the policy cannot read, or has no room for, is left out.
    """
    panel, known = standard_of(policy.tokenizer), {spec.partition("?")[0] for spec in besides}
    short = replace(sampling, max_completion_tokens=min(panel.max_completion_tokens, sampling.max_completion_tokens))
    budget, told = min(panel.completions, completions), {}
    for spec in panel.tasks:
        task = _loaded(spec) if spec not in known else None
        prompts = list(_asked(policy, task, min(PROMPTS, budget), short.max_completion_tokens)) if task else []
        if task and prompts:
            told[spec] = evaluate(engine, prompts, task, short, -(-budget // len(prompts)), seed, ranks=ranks)
    return told


@lru_cache(maxsize=16)
def _loaded(spec: str) -> Task:
    return get_task(f"{spec}?train_size=1&test_size={PROMPTS}")


def _asked(policy: Policy, task: Task, most: int, cap: int) -> Iterator[Prompt]:
    """Held-out prompts as the policy reads them; none that it cannot read."""
    for prompt in task.test[:most]:
        try:
            rendered = policy.template.render(prompt, policy.tokenizer)
        except KeelError:  # the template's answer to: can this model read it?
            continue
        if len(rendered.token_ids) + cap <= policy.context:
            yield rendered
