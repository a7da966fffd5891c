"""What the bundled models can do besides sums: watched while sums are trained, to see what is forgotten or gained."""

from __future__ import annotations

from keel.tasks.arithmetic import size_option
from keel.tasks.problems import SKILLS, family_task
from keel.tasks.task import PromptTask, pick_variant


def skills(variant: str, train_size: int | str = 4096, test_size: int | str = 256) -> PromptTask:
    """One skill, answered in one line as "A:…".

    Args:
        variant: "subtract" ("Q:31-14=⏎" → 17), "sort" (digits, "S:40291⏎" → 01249), "reverse" (letters, "R:abc⏎" → cba)
            or "max" ("M:12,45,7⏎" → 45).
        train_size, test_size: prompts at most.
    """
    family = SKILLS[pick_variant("skills", variant, SKILLS)]
    sizes = size_option("train_size", train_size), size_option("test_size", test_size)
    return family_task(family, f"skills:{variant}", *sizes)
