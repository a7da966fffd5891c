"""Sums: for the bundled models in three tiers of difficulty, and in words for a real language model."""

from __future__ import annotations

import itertools
import random

from keel.errors import KeelError
from keel.rewards.exact import exact, last_number
from keel.tasks.problems import SUMS, family_task
from keel.tasks.task import PromptTask, held_out, pick_variant
from keel.types import Prompt

TIERS = {"easy": 2, "medium": 3, "hard": 4}
DIGITS = {"1digit": 1, "2digit": 2, "3digit": 3}
QUESTION = "Calculate {a} + {b}. Write only the result."


def arithmetic(variant: str, train_size: int | str = 8000, test_size: int | str = 512) -> PromptTask:
    """Sums of 2 (easy), 3 (medium) or 4 (hard) terms of 1 … 20 for the bundled models: "Q:12+5+20=⏎", answer "A:37".

    A line may work a step before the answer ("12+5=17"). No test sum is a reordering of a training sum, and the bundled
    models saw none of them in pretraining. Easy has 400 sums in all, so both sizes are "at most".
    """
    terms = TIERS[pick_variant("arithmetic", variant, TIERS)]
    sizes = size_option("train_size", train_size), size_option("test_size", test_size)
    return family_task(SUMS[terms], f"arithmetic:{variant}", *sizes)


def sums(variant: str, question: str = QUESTION, train_size: int | str = 4096, test_size: int | str = 256) -> PromptTask:
    """Two numbers to add, for a language model: "Calculate 17 + 25. Write only the result."; the last number it writes
    is graded.

    Args:
        variant: "1digit", "2digit" or "3digit": both terms have so many digits.
        question: another wording, with {a} and {b} in it.
    """
    digits = DIGITS[pick_variant("sums", variant, DIGITS)]
    if "{a}" not in question or "{b}" not in question:
        raise KeelError(f"Task 'sums' got the question {question!r}. Expected a text with {{a}} and {{b}} in it.")
    sizes = {"train": size_option("train_size", train_size), "test": size_option("test_size", test_size)}
    splits: dict[str, list[Prompt]] = {"train": [], "test": []}
    for a, b in _pairs(digits):
        split = "test" if held_out(f"sums {min(a, b)} {max(a, b)}") else "train"
        if len(splits[split]) < sizes[split]:
            text = question.replace("{a}", str(a)).replace("{b}", str(b))
            splits[split].append(Prompt(id=f"sums/{a}+{b}", text=text, answer=str(a + b)))
    return PromptTask(f"sums:{variant}", splits["train"], splits["test"], exact(last_number))


def _pairs(digits: int) -> list[tuple[int, int]]:
    """Pairs of numbers with so many digits, shuffled; of three digits, 20,000 of them."""
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    rng = random.Random(f"sums {digits}")
    if digits > 2:
        return list(dict.fromkeys((rng.randrange(low, high), rng.randrange(low, high)) for _ in range(20_000)))
    pairs = list(itertools.product(range(low, high), repeat=2))
    rng.shuffle(pairs)
    return pairs


def size_option(name: str, value: int | str) -> int:
    """A number of prompts, which a spec gives as text.

    Raises:
        KeelError: not a whole number of at least 1.
    """
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise KeelError(f"Task option {name} is {value!r}. Expected a whole number of at least 1.")
    return size
