"""A recipe with its settings as another engine's configuration: what `keel export RECIPE --to trl` writes.

TRL and verl get knobs of their own. The file is read back by what reads any of theirs (`keel.audit.translate`), and whatever
comes back otherwise than it went in is named: that is what the engine cannot express. With `adapter=True`, and always for
prime-rl and slime, the configuration names keel's loss instead of saying it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keel.audit.peers.reading import Reading
from keel.audit.peers.trl_reading import read_trl
from keel.audit.peers.verl_reading import read_verl
from keel.audit.translate import as_recipe
from keel.config import RunConfig
from keel.errors import KeelError, nearest
from keel.integrations import prime_rl, slime, trl_knobs, verl, verl_knobs
from keel.integrations.objectives import refuse_beyond
from keel.objectives.aggregate import token_mean
from keel.objectives.papers import difference
from keel.objectives.registry import Recipe


@dataclass(frozen=True)
class Written:
    """A configuration.

    Args:
        text: of the file, in the engine's own format.
        missing: what it does not express of the recipe, each in a phrase.
    """

    text: str
    missing: tuple[str, ...]


def write(engine: str, config: RunConfig, adapter: bool = False) -> Written:
    """The configuration of an engine for a run of keel's.

    Args:
        engine: "trl", "verl", "prime-rl" or "slime".
        config: recipe and settings.
        adapter: of TRL and verl: name keel's loss, instead of expressing the recipe in knobs of theirs.

    Raises:
        KeelError: no such engine, or keel's loss is asked for and cannot be held by it.
    """
    if engine not in ENGINES:
        raise KeelError(f"No engine is named {engine!r}; {nearest(engine, ENGINES)}Expected one of: {', '.join(ENGINES)}.")
    config = config.resolved()
    habits = dict(dynamic_sampling=config.train.dynamic_sampling, updates_per_batch=config.train.updates_per_batch)
    return ENGINES[engine](replace(config.chosen(), **habits), config, adapter)


def _trl(recipe: Recipe, config: RunConfig, adapter: bool) -> Written:
    loop = trl_knobs.of_loop(config)
    if adapter:
        note = f"# for KeelGRPOTrainer(objective={recipe.name!r}, …) of keel.integrations.trl: the loss is keel's"
        lost = _habits(recipe, dynamic="TRL does not sample until groups are live")
        return Written(_yaml(loop, note), (*lost, *_changed(config)))
    knobs = trl_knobs.of_objective(recipe.objective) | loop
    return Written(_yaml(knobs, f"# {recipe.name} in TRL's own knobs"), _lost(recipe, read_trl(knobs)))


def _verl(recipe: Recipe, config: RunConfig, adapter: bool) -> Written:
    loop = verl_knobs.of_loop(recipe, config)
    if adapter:
        refuse_beyond("verl", recipe.name, verl.beyond(recipe.objective))
        knobs = loop | verl.settings(recipe, config.sampling.max_completion_tokens)
        note = "# VERL_USE_EXTERNAL_MODULES=keel.integrations.verl_plugin registers its losses"
        return Written(_yaml(_nested(knobs), note), _lost(recipe, read_verl(knobs)))
    knobs = verl_knobs.of_objective(recipe.objective, config) | loop
    return Written(_yaml(_nested(knobs), f"# {recipe.name} in verl's own knobs"), _lost(recipe, read_verl(knobs)))


def _prime_rl(recipe: Recipe, config: RunConfig, adapter: bool) -> Written:
    import tomli_w

    named = {"type": "custom", "kwargs": {"recipe": recipe.name}}
    tables = {
        "max_steps": config.steps,
        "model": {"name": config.model},
        "trainer": {
            "optim": {"lr": config.train.lr, "weight_decay": config.train.weight_decay},
            "loss": {"import_path": "keel.integrations.prime_rl.loss", **named},
        },
        "orchestrator": {
            "batch_size": config.train.prompts_per_step * config.train.group_size,
            "rollouts_per_example": config.train.group_size,
            "advantage": {"import_path": "keel.integrations.prime_rl.advantage", **named},
            "sampling": {"temperature": config.sampling.temperature, "max_tokens": config.sampling.max_completion_tokens},
        },
    }
    habits = _habits(recipe, dynamic="set buffer.online_difficulty_filtering", updates="1")
    return Written(tomli_w.dumps(tables), (*prime_rl.beyond(recipe.objective), *_changed(config), *habits))


def _slime(recipe: Recipe, config: RunConfig, adapter: bool) -> Written:
    train, sampling, objective = config.train, config.sampling, recipe.objective
    flags: dict[str, Any] = {
        "loss-type": "custom_loss",
        "custom-loss-function-path": "keel.integrations.slime.loss",
        "custom-reward-post-process-path": "keel.integrations.slime.advantages",
        "custom-config-path": "keel.yaml",
        "advantage-estimator": "grpo",
        "rollout-batch-size": train.prompts_per_step * recipe.updates_per_batch,
        "n-samples-per-prompt": train.group_size,
        "global-batch-size": train.prompts_per_step * train.group_size,
        "rollout-max-response-len": sampling.max_completion_tokens,
        "rollout-temperature": sampling.temperature,
        "num-rollout": -(-config.steps // recipe.updates_per_batch),
        "lr": train.lr,
    }
    if objective.aggregate is token_mean:
        flags["calculate-per-token-loss"] = None
    if objective.loss_kl is not None:
        flags |= {"use-kl-loss": None, "kl-loss-coef": 0.0}  # the reference is loaded, and its KL is keel's
    if recipe.dynamic_sampling:
        flags["dynamic-sampling-filter-path"] = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    lines = [f"--{name}" if value is None else f"--{name} {value}" for name, value in flags.items()]
    head = f"# arguments of slime's train.py; keel.yaml holds one line: keel_recipe: {recipe.name}"
    return Written("\n".join([head, *lines, ""]), (*slime.beyond(objective), *_changed(config)))


ENGINES: dict[str, Callable[[Recipe, RunConfig, bool], Written]] = {
    "trl": _trl,
    "verl": _verl,
    "prime-rl": _prime_rl,
    "slime": _slime,
}


def _lost(recipe: Recipe, reading: Reading) -> tuple[str, ...]:
    """Where a configuration, read back, is not the recipe that was written."""
    apart = difference(recipe, as_recipe(reading))
    return (*(f"{d.field} is {d.a}; there {d.b}" for d in apart), *(f"{item.knob}: {item.says}" for item in reading.beyond))


def _habits(recipe: Recipe, dynamic: str, updates: str = "") -> tuple[str, ...]:
    lost = [f"dynamic_sampling is on; {dynamic}"] if recipe.dynamic_sampling else []
    several = updates and recipe.updates_per_batch > 1
    return (*lost, *([f"updates_per_batch is {recipe.updates_per_batch}; there {updates}"] if several else []))


def _changed(config: RunConfig) -> list[str]:
    """Changes to a recipe, where only its name is passed on."""
    return [f"objective.{path} = {value}: register a recipe of that objective" for path, value in config.objective.items()]


def _nested(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as tables."""
    tree: dict[str, Any] = {}
    for name, value in knobs.items():
        *path, last = name.split(".")
        at = tree
        for step in path:
            at = at.setdefault(step, {})
        at[last] = value
    return tree


def _yaml(content: Mapping[str, Any], head: str) -> str:
    import yaml

    return f"{head}\n" + yaml.safe_dump(dict(content), sort_keys=False)
