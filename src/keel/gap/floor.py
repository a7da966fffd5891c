"""The impure part: completions from an engine, and what the trainer says of them, also against itself (the noise floor)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError
from keel.models.policy import Policy
from keel.objectives.kl import k3
from keel.rollout.engine import Engine, Seed, check_completions
from keel.tasks.task import Task
from keel.training.batch import batch_from_groups, micro_batches
from keel.training.buffer import PromptStream
from keel.training.step import look
from keel.types import Batch, Group, Sampling, Score

GAP = 2**31 + 2  # the step that a gap is measured under: never training's, an evaluation's or an audit's
ALONE = 64  # completions that the floor computes one by one


@dataclass(frozen=True)
class Floor:
    """The trainer against itself, computed otherwise.

    Args:
        max_abs_nats, k3_nats: of the way of computing that differs most.
        by: the largest |difference| in nats of each way: in smaller micro-batches, in another row order, each completion alone.
    """

    max_abs_nats: float
    k3_nats: float
    by: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def sample(
    engine: Engine, policy: Policy, task: Task, sampling: Sampling, *, completions: int, group_size: int, seed: int
) -> Batch:
    """At least that many completions of training prompts, `group_size` of each, held to the engine's contract.

    Raises:
        KeelError: the engine broke its contract, or failed on every completion.
    """
    prompts = PromptStream(task.train, seed).take(max(1, -(-completions // group_size)))
    asked = [policy.template.render(prompt, policy.tokenizer) for prompt in prompts]
    made = engine.generate(asked, sampling, Seed(seed, GAP), group_size)
    vocab_size = policy.base.get_output_embeddings().weight.shape[0]
    check_completions(asked, made, group_size, sampling, end_ids=policy.end_ids, vocab_size=vocab_size, version=engine.version)
    alive = [completion for completion in made if completion.finish != "error"]
    if not alive:
        raise KeelError(
            f"The engine failed on all {len(made)} completions; the first said: {made[0].error}. Expected some to measure a gap "
            "on. Mend the engine first."
        )
    groups = [
        Group(prompt, tuple(made[i : i + group_size]), (Score(0.0),) * group_size)
        for i, prompt in zip(range(0, len(made), group_size), asked, strict=True)
    ]
    return batch_from_groups(groups)


@torch.no_grad()
def noise_floor(policy: Policy, batch: Batch, logp: Float[Tensor, "B T"], temperature: float) -> Floor:
    """The trainer's log-probabilities again: in micro-batches a seventh as large, with rows reversed, and one by one.

    Args:
        logp: as training computes them.
    """
    rows, few = torch.arange(len(batch)), torch.arange(min(len(batch), ALONE))
    tokens = int((batch.prompt_len + batch.completion_len).sum())
    smaller = look(policy, batch, micro_batches(batch, max(1, tokens // 7)), temperature).logp
    turned = look(policy, batch, [rows.flip(0)], temperature).logp
    alone = look(policy, batch.rows(few), list(few[:, None]), temperature).logp
    ways = {"in smaller micro-batches": smaller, "rows in reverse": turned, "each completion alone": alone}
    found = {name: _difference(other, logp[: len(other)], batch.mask[: len(other)]) for name, other in ways.items()}
    worst = max(found.values())
    return Floor(worst[0], worst[1], {name: largest for name, (largest, _) in found.items()})


def _difference(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    d = (a - b)[mask].double()
    return float(d.abs().max()), float(k3(-d).mean())
