"""What a policy scores on prompts that it never trains on: the task's own, a panel's, and the standard panel's of other skills."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from keel.config import RunConfig
from keel.models.policy import Policy
from keel.parts import Parts, assemble
from keel.rollout.engine import Engine, Seed
from keel.run_folder import RunFolder
from keel.summary import panel_name
from keel.tasks.task import Task, capped

EVALUATION = 2**31  # the step that evaluations draw under: the same draws each time, and never training's


def held_out(parts: Parts, standard: bool = False) -> dict[str, float]:
    """Every number of one evaluation by its metric's name: the task's test split, and each panel task's; at both ends of a run
    (`standard`) the standard panel's too.

    The template, the sampling and the reward are training's own. The policy is the trainer's: where the engine is not
    exact another one stands in for it, and what it scores itself on the task is told as `eval/sampler/…`.
    """
    start, exact = time.perf_counter(), getattr(parts.engine, "exact", True)
    engine = parts.engine if exact else _exact_engine(parts.policy)
    told, caps = {}, {panel_name(spec): capped(spec)[1] for spec in parts.config.evaluation.panel}
    for name, task in (("", parts.task), *parts.panel.items()):
        numbers = _evaluated(parts, engine, task, caps.get(name))
        told |= {f"eval/{name}/{key}" if name else f"eval/{key}": value for key, value in numbers.items()}
    if standard and parts.config.evaluation.standard_panel:
        for name, numbers in _standard_panel(parts, engine).items():
            told |= {f"eval/{name}/{key}": value for key, value in _named(numbers).items()}
    if not exact:
        told |= {f"eval/sampler/{key}": value for key, value in _evaluated(parts, parts.engine, parts.task).items()}
    return told | {"time/eval_s": time.perf_counter() - start}


def before_training(folder: RunFolder, config: RunConfig, names: Iterable[str]) -> dict[str, Any]:
    """The same numbers of the model that a run began with: as its first row has them, or measured now where it has not, or where
    the settings are no longer the run's.
    """
    first = next((row for row in folder.rows() if row["step"] == 0), {})
    return first if config == folder.config and set(names) <= first.keys() else held_out(assemble(config), standard=True)


def _exact_engine(policy: Policy) -> Engine:
    from keel.rollout.local import LocalEngine

    return LocalEngine(policy)


def _evaluated(parts: Parts, engine: Engine, task: Task, cap: int | None = None) -> dict[str, float]:
    from keel.evaluate import evaluate

    settings, policy = parts.config.evaluation, parts.policy
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in task.test[: settings.prompts]]
    seed = Seed(parts.config.seed, EVALUATION)
    ks, sampling = tuple(sorted({1, *settings.ks})), parts.config.sampling.distribution()
    sampling = replace(sampling, max_completion_tokens=cap or sampling.max_completion_tokens)
    return _named(evaluate(engine, prompts, task, sampling, settings.samples, seed, ks, parts.ranks))


def _standard_panel(parts: Parts, engine: Engine) -> dict[str, dict[str, float]]:
    from keel.evaluate.standard import standard_panel

    config, most = parts.config, parts.config.evaluation.prompts * parts.config.evaluation.samples
    besides, seed = (config.task, *config.evaluation.panel), Seed(config.seed, EVALUATION)
    return standard_panel(engine, parts.policy, besides, config.sampling.distribution(), most, seed, parts.ranks)


def _named(numbers: dict[str, float]) -> dict[str, float]:
    """An evaluation's numbers as metrics: shares in place of counts, and the interval named after what it bounds."""
    told = {name: value for name, value in numbers.items() if name.startswith("pass@") or "_" in name}
    told |= {"pass@1_low": numbers["low"], "pass@1_high": numbers["high"]}
    return told | {"unscorable_frac": numbers["unscorable"] / (numbers["prompts"] * numbers["samples"])}
