"""Evaluation by sampling: one task, or a panel of tasks that shows what generalises and what is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from keel.errors import KeelError
from keel.evaluate.estimates import interval, pass_at_k
from keel.rollout.engine import Engine, Seed
from keel.tasks.task import Task, reward_many
from keel.training.ranks import ALONE, Ranks
from keel.types import Completion, Prompt, Sampling, Score


@dataclass(frozen=True)
class Graded:
    """One prompt's completions with their scores, in the order of samples."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def right(self) -> int:
        """Completions that are right. An unscorable one is not: in evaluation, what failed did not succeed."""
        return sum(score.scorable and score.correct for score in self.scores)


def evaluate(
    engine: Engine, prompts: Sequence[Prompt], task: Task, sampling: Sampling, samples: int, seed: Seed,
    ks: Sequence[int] = (1,), ranks: Ranks = ALONE,
) -> dict[str, float]:  # fmt: skip
    """What the engine's policy scores on these prompts. The same arguments give the same numbers.

    Args:
        prompts: held-out ones, rendered.
        samples: completions of each prompt.
        seed: of the draws; take the same one before and after training, so that the two differ by the policy alone.
        ks: for which pass@k is estimated; each at most `samples`.
        ranks: each asks a share of the prompts, and all get the numbers of all.

    Returns:
        pass@1 (which is avg@samples) and every other pass@k asked for; low and high, the 95 % interval of pass@1
        (`estimates.interval`); reward_mean over scorable completions (NaN if there are none); length_mean in tokens;
        truncated_frac; unscorable, prompts and samples as counts.

    Raises:
        KeelError: no prompts, a k that cannot be estimated, or completions that are not those asked for.
    """
    if not prompts or samples < 1:
        raise KeelError(
            f"Evaluation of task {task.name!r} was given {len(prompts)} prompts and {samples} samples. Expected at "
            f"least one of each."
        )
    return describe(ranks.spread(lambda some: grade(engine, some, task, sampling, samples, seed))(prompts), ks)


def describe(graded: Sequence[Graded], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """The numbers that `evaluate` returns, of prompts that have the same number of completions each."""
    samples, counts = len(graded[0].scores), [row.right for row in graded]
    low, high = interval(counts, samples)
    return {
        **{f"pass@{k}": sum(pass_at_k(samples, c, k) for c in counts) / len(counts) for k in sorted({1, *ks})},
        **{"low": low, "high": high},
        **_means(graded),
        **{"prompts": float(len(graded)), "samples": float(samples)},
    }


def grade(engine: Engine, prompts: Sequence[Prompt], task: Task, sampling: Sampling, samples: int, seed: Seed) -> list[Graded]:
    """Every prompt with its completions and their scores, in the order of `prompts`; matched by id, never by position.

    Raises:
        KeelError: a prompt got other than `samples` completions, or one was answered that was not asked.
    """
    answers: dict[str, list[Completion]] = {prompt.id: [] for prompt in prompts}
    for completion in engine.generate(prompts, sampling, seed, samples):
        if completion.prompt_id not in answers:
            raise KeelError(
                f"The engine answered prompt {completion.prompt_id!r}, which evaluation did not ask. Expected the ids "
                f"of the {len(prompts)} prompts given; mend the engine."
            )
        answers[completion.prompt_id].append(completion)
    rows = [(prompt, _ordered(prompt, answers[prompt.id], samples)) for prompt in prompts]
    scores = iter(reward_many(task, [(prompt, c.text, c.finish) for prompt, ordered in rows for c in ordered]))
    return [Graded(prompt, ordered, tuple(islice(scores, samples))) for prompt, ordered in rows]


def panel(
    engine: Engine, prompts: Mapping[str, Sequence[Prompt]], tasks: Sequence[Task], sampling: Sampling, samples: int,
    seed: Seed, ks: Sequence[int] = (1,),
) -> dict[str, dict[str, float]]:  # fmt: skip
    """`evaluate` on several tasks: task name → its numbers. Compared over time, they show what training one of them did
    to the others.

    Args:
        prompts: task name → its held-out prompts, rendered.
    """
    return {task.name: evaluate(engine, prompts[task.name], task, sampling, samples, seed, ks) for task in tasks}


def _ordered(prompt: Prompt, completions: Sequence[Completion], samples: int) -> tuple[Completion, ...]:
    if len(completions) != samples:
        raise KeelError(
            f"The engine gave {len(completions)} completions of prompt {prompt.id!r}. Expected {samples}; prompts need "
            f"ids of their own, and a failed completion still has to come back, with finish 'error'."
        )
    return tuple(sorted(completions, key=lambda completion: completion.sample))


def _means(graded: Sequence[Graded]) -> dict[str, float]:
    completions = [completion for row in graded for completion in row.completions]
    scores = [score for row in graded for score in row.scores]
    values = [score.value for score in scores if score.value is not None]
    return {
        "reward_mean": sum(values) / len(values) if values else float("nan"),
        "length_mean": sum(len(completion.token_ids) for completion in completions) / len(completions),
        "truncated_frac": sum(completion.finish == "length" for completion in completions) / len(completions),
        "unscorable": float(len(scores) - len(values)),
    }
