"""keel: a bench for reinforcement-learning post-training of language models.

    import keel

    run = keel.train("solid", model="tiny-dense", task="arithmetic:medium")
    run.report()

This file is the table of contents. A name is imported when it is first used, so that `import keel` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel.config import RunConfig as RunConfig
    from keel.config import load_config as load_config
    from keel.errors import KeelError as KeelError
    from keel.models.load import load_policy as load_policy
    from keel.objectives.objective import Objective as Objective
    from keel.objectives.recipes import RECIPES as RECIPES
    from keel.objectives.recipes import Recipe as Recipe
    from keel.objectives.recipes import recipe as recipe
    from keel.objectives.recipes import register as register
    from keel.run import Run as Run
    from keel.run import resume as resume
    from keel.run import train as train
    from keel.tasks.task import get_task as get_task
    from keel.types import Batch as Batch
    from keel.types import Claim as Claim
    from keel.types import Completion as Completion
    from keel.types import Group as Group
    from keel.types import Prompt as Prompt
    from keel.types import Sampling as Sampling
    from keel.types import Score as Score
    from keel.types import StepCounts as StepCounts

__version__ = "0.1.0"

CONTENTS = {
    "keel.run": ("train", "resume", "Run"),
    "keel.config": ("RunConfig", "load_config"),
    "keel.errors": ("KeelError",),
    "keel.types": ("Prompt", "Sampling", "Completion", "Score", "Group", "StepCounts", "Batch", "Claim"),
    "keel.objectives.objective": ("Objective",),
    "keel.objectives.recipes": ("Recipe", "RECIPES", "recipe", "register"),
    "keel.models.load": ("load_policy",),
    "keel.tasks.task": ("get_task",),
}
_HOME = {name: home for home, names in CONTENTS.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: F822 - bound on first use


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keel' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
