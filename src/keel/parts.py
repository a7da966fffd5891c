"""What a run is made of, loaded from its settings: the policy, an engine, the task and its panel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from keel.config import RunConfig
from keel.models.policy import Policy
from keel.objectives.recipes import Recipe
from keel.ray_cluster import check_listens
from keel.rollout.engine import Engine
from keel.run_folder import RunFolder
from keel.summary import panel_name
from keel.tasks.task import Task, capped, get_task
from keel.training import checkpoint
from keel.training.ranks import ALONE, Ranks
from keel.writers import check_writers

MakeEngine = Callable[[Policy], Engine]


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: RunConfig
    policy: Policy
    engine: Engine
    task: Task
    recipe: Recipe
    panel: dict[str, Task] = field(default_factory=dict)
    ranks: Ranks = ALONE


def assemble(
    config: RunConfig,
    policy: Policy | None = None,
    make_engine: MakeEngine | None = None,
    find_task: Callable[[str], Task] | None = None,
    ranks: Ranks = ALONE,
) -> Parts:
    """Load what the settings name: the policy (unless given), an engine, the task and its panel; check that they
    fit. Tasks are found by `find_task`; by one that checks them unless given.
    """
    from keel.rollout.engines import engine_of

    checkpoint.seed_random_state(config.seed)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    check_writers(config.writers)
    if config.cluster.ray:
        check_listens(config.cluster.ray)
    find = find_task or get_task
    task, recipe = find(config.task), config.chosen()
    panel = {panel_name(spec): find(capped(spec)[0]) for spec in config.evaluation.panel}
    policy = policy or _loaded(config)
    config.check_fits(policy.context, _longest_prompt(policy, (task, *panel.values())))
    engine = make_engine(policy) if make_engine else engine_of(config.engine, policy)
    if not ranks.first:
        checkpoint.seed_random_state(config.seed + ranks.rank)  # a user's reward that draws should not draw the same on every rank
    return Parts(config, policy, engine, task, recipe, panel, ranks)


def trained_policy(folder: RunFolder, step: int | None = None) -> Policy:
    """The policy of a run as its newest checkpoint (or that of one step) holds it."""
    policy = _loaded(folder.config)
    _, tensors, _ = checkpoint.load(folder.checkpoints, step)
    with torch.no_grad():
        for name, parameter in policy.parameters().items():
            parameter.copy_(tensors[f"weights.{name}"])
    return policy


def _loaded(config: RunConfig) -> Policy:
    from keel.models.load import load_policy
    from keel.models.lora import LoraConfig

    lora = LoraConfig(**config.lora.model_dump()) if config.lora else None
    train = config.train
    computing = dict(products=torch.bfloat16 if train.dtype == "bf16" else None, recompute=train.checkpoint_activations)
    return load_policy(config.model, template=config.template, lora=lora, device=train.device, seed=config.seed, **computing)


def _longest_prompt(policy: Policy, tasks: tuple[Task, ...], looked_at: int = 64) -> int:
    """Tokens of the longest rendered prompt among those with the most characters."""
    prompts = [prompt for task in tasks for prompt in (*task.train, *task.test)]
    wordy = sorted(prompts, key=lambda prompt: len(prompt.text))[-looked_at:]
    return max((len(policy.template.render(prompt, policy.tokenizer).token_ids) for prompt in wordy), default=0)
