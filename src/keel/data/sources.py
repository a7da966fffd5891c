"""Where candidates come from: tasks, and variations of those that can be made to any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from keel.tasks.arithmetic import sums as worded_sums
from keel.tasks.problems import LETTERS, SKILLS, Family, family_task, sums
from keel.tasks.task import Task, get_task

TERMS, LARGEST = (2, 3, 4, 5), (9, 20, 50)
LENGTHS, ALPHABETS = (4, 6, 8), {"sort": "0123456789", "reverse": LETTERS}
WORDINGS = (
    "What is {a} + {b}? Write only the result.",
    "Add {a} to {b}. Write only the result.",
    "There are {a} apples in one box and {b} in another. How many are there together? Write only the number.",
)


@dataclass(frozen=True)
class Source:
    """A task whose training prompts are candidates, and what it is a variation of ("" if of nothing)."""

    task: Task
    of: str = ""

    @property
    def name(self) -> str:
        return self.task.name


def sources(spec: str, variations: bool, most: int) -> list[Source]:
    """The task, and its variations where they are asked for and known.

    Args:
        most: prompts of a variation.
    """
    own = [Source(get_task(spec))]
    if not variations:
        return own
    kind, _, variant = spec.partition("?")[0].partition(":")
    return own + [Source(task, spec) for task in VARIED.get(kind, _none)(variant, most) if task.name != spec]


def _none(variant: str, most: int) -> Iterator[Task]:
    yield from ()


def _arithmetic(variant: str, most: int) -> Iterator[Task]:
    """Sums of other lengths and sizes, of whose problems none is held out."""
    for terms in TERMS:
        for largest in LARGEST:
            yield family_task(sums(terms, largest), f"sums of {terms} up to {largest}", most, 0, seed=1)


def _skills(variant: str, most: int) -> Iterator[Task]:
    if variant in ALPHABETS:
        for length in LENGTHS:
            yield family_task(_of_length(SKILLS[variant], length), f"{variant} of {length}", most, 0, seed=1)


def _of_length(family: Family, length: int) -> Family:
    alphabet = ALPHABETS[family.name]
    return replace(family, draw=lambda rng: ("".join(rng.choice(alphabet) for _ in range(length)),))


def _sums(variant: str, most: int) -> Iterator[Task]:
    for number, wording in enumerate(WORDINGS, 1):
        task = worded_sums(variant, question=wording, train_size=most, test_size=1)
        train = [replace(prompt, id=f"{prompt.id}/{number}") for prompt in task.train]
        yield replace(task, name=f"sums:{variant}, wording {number}", train=train)


VARIED: dict[str, Callable[[str, int], Iterator[Task]]] = {"arithmetic": _arithmetic, "skills": _skills, "sums": _sums}
