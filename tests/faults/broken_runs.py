"""Short runs with faults in them, and healthy ones with their oddities; each is read by the doctor as `keel doctor RUN` reads it.

The fault stays in the living system while the doctor asks it, as it does for whoever has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seeded import SEEDED, planted

from keel import train
from keel.doctor.triage import Triage, triage
from keel.errors import KeelError

FEW = {"evaluation.prompts": 8, "evaluation.samples": 2, "evaluation.standard_panel": False, "record.tokens_every": 2}
SHORT = FEW | {"steps": 4, "train.prompts_per_step": 16, "train.probe_every": 1}
SMALL = SHORT | {"task": "arithmetic:medium?train_size=600&test_size=200"}
PAIRS = [  # faults of different parts or components, neither of which hides the other
    ("left padding is read", "grader finds the answer anywhere"),
    ("engine keeps one old tensor", "every row stands there 200 times"),
    ("end tokens are not trained", "resuming without moments"),
    ("each micro-batch has its own denominators", "engine takes top_p from the model"),
    ("a cap that cuts everything", "a tensor is never trained"),
    ("a cap that cuts everything", "engine says raw log-probabilities"),
    ("grader is always 0", "engine never loads"),
    ("grader misses half", "divided by the number of micro-batches too"),
    ("held-out questions are trained on", "engine in bfloat16"),
    ("grader rewards the wrong", "resuming without moments"),
    ("too hard for the base", "only the last micro-batch counts"),
    ("a fifth of the golds cannot be graded", "engine answers from a stale cache"),
    ("advantages of the wrong sign", "held-out questions are trained on"),
    ("entropy below 0", "grader fails in threads"),
    ("every sample is the same", "grader swallows errors"),
    ("KL of the wrong sign", "engine with noise"),
    ("half of the golds are wrong", "rows left over are trained twice"),
    ("a learning rate that changes no bit", "grader is always 1"),
    ("a non-finite gradient is applied", "every row stands there 200 times"),
    ("another reference", "all questions are the same"),
]
HEALTHY: list[tuple[str, dict[str, Any]]] = [  # recipe, settings
    ("solid", {}),
    ("solid", {"seed": 1, "train.lr": 1e-7}),  # nothing to see yet
    ("solid", {"seed": 2, "steps": 2}),  # short
    ("solid", {"seed": 3, "task": "arithmetic:easy", "train.lr": 1e-3}),
    ("solid", {"seed": 4, "train.prompts_per_step": 2, "train.group_size": 2}),  # most groups without signal
    ("solid", {"seed": 5, "task": "arithmetic:hard", "sampling.max_completion_tokens": 64}),
    ("solid", {"seed": 6, "model": "tiny-moe"}),
    ("solid", {"seed": 7, "task": "skills:sort"}),
    ("solid", {"seed": 8, "lora": {"rank": 4}}),
    ("solid", {"seed": 9, "sampling.temperature": 0.6}),
    ("grpo", {"seed": 10, "task": "arithmetic:easy", "sampling.temperature": 0.7}),
    ("grpo", {"seed": 11, "train.updates_per_batch": 4}),
    ("grpo", {"seed": 12, "model": "tiny-moe", "train.updates_per_batch": 2}),
    ("grpo", {"seed": 13, "train.max_staleness": 2}),
    ("dapo", {"seed": 14, "model": "tiny-moe", "sampling.temperature": 1.2}),
    ("dapo", {"seed": 15, "task": "arithmetic:hard", "sampling.max_completion_tokens": 64}),
    ("dr_grpo", {"seed": 16, "task": "skills:sort"}),
    ("rloo", {"seed": 17, "task": "skills:subtract", "train.group_size": 2}),
    ("rloo", {"seed": 18, "train.micro_batch_tokens": 300}),
    ("gspo", {"seed": 19, "task": "arithmetic:hard", "sampling.top_p": 0.9}),
    ("minirl", {"seed": 20, "model": "tiny-moe", "train.routing_replay": "R3"}),
    ("tis", {"seed": 21, "lora": {"rank": 4}, "train.micro_batch_tokens": 300}),
    ("reinforce_pp", {"seed": 22, "task": "skills:max", "train.max_staleness": 1}),
    ("deepseek_v32", {"seed": 23, "task": "arithmetic:hard", "sampling.max_completion_tokens": 64}),
    ("lite_ppo", {"seed": 24}),
    ("cispo", {"seed": 25, "train.updates_per_batch": 2}),
    ("sapo", {"seed": 26, "train.curriculum": "pass_rate"}),
    ("icepop", {"seed": 27, "sampling.min_p": 0.02}),
    ("decoupled", {"seed": 28, "train.updates_per_batch": 2}),
    ("gmpo", {"seed": 29, "train.group_size": 16}),
]


def broken(names: tuple[str, ...], out: Path, *, folder_only: bool = False, **changes: Any) -> Triage:
    """What the doctor says of a short run with these faults in it; where the run dies of them, of what it left."""
    with planted(*names) as settings:
        settings = SMALL | settings | changes
        try:
            train(settings.pop("recipe", "solid"), **settings, out=str(out), quiet=True)
        except (KeelError, ValueError, AssertionError, RuntimeError):
            assert out.is_dir(), "the run left nothing"
        return triage(str(out), folder_only=folder_only)


def healthy(recipe: str, settings: dict[str, Any], out: Path, *, folder_only: bool = False) -> Triage:
    """What the doctor says of a short run without a fault."""
    train(recipe, **SHORT | {"task": "arithmetic:medium"} | settings, out=str(out), quiet=True)
    return triage(str(out), folder_only=folder_only)


def part_is_right(told: Triage, names: tuple[str, ...]) -> bool:
    """Whether the verdicts are the parts that these faults are of, and no others."""
    return set(told.diagnosis.verdicts) == {SEEDED[name].part for name in names}


def named(told: Triage, names: tuple[str, ...]) -> list[bool]:
    """For each fault, whether its component is named."""
    said = [finding.fault.component.lower() for finding in told.diagnosis.findings]
    return [any(SEEDED[name].component.lower() in component for component in said) for name in names]
