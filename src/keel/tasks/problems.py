"""Families of small problems over a character vocabulary: how one is drawn, asked and answered.

The bundled models are pretrained on these families (`models/corpus.py`) and the tasks `arithmetic` and `skills` ask
them. Which problems are held out is decided here, once, for both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from keel.rewards.exact import after_marker, exact
from keel.tasks.task import PromptTask, held_out
from keel.types import Prompt

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LISTED = 10_000  # families of at most so many problems are listed, others drawn


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Args:
        name: unique among families.
        draw: a random problem, as a tuple of its parts.
        ask: the prompt's text; every prompt ends with a line break.
        answer: the right answer.
        key: equal for problems that differ only in the order of their parts: they share a split.
        every: all problems, where they are few enough to be listed; else None.
    """

    name: str
    draw: Callable[[random.Random], tuple]
    ask: Callable[[tuple], str]
    answer: Callable[[tuple], str]
    key: Callable[[tuple], tuple]
    every: Callable[[], Iterable[tuple]] | None = None

    def in_test(self, parts: tuple) -> bool:
        """Whether a problem is held out from pretraining and from training."""
        return held_out(f"{self.name} {self.key(parts)}")

    def prompt(self, parts: tuple) -> Prompt:
        text = self.ask(parts)
        return Prompt(id=f"{self.name}/{text.strip()}", text=text, answer=self.answer(parts))

    def distinct(self, rng: random.Random) -> Iterator[tuple]:
        """Distinct problems in random order: all of them where they can be listed, else without end."""
        if self.every is not None:
            listed = list(self.every())
            rng.shuffle(listed)
            yield from listed
            return
        seen: set[tuple] = set()
        while True:
            parts = self.draw(rng)
            if parts not in seen:
                seen.add(parts)
                yield parts


def family_task(family: Family, name: str, train_size: int, test_size: int, seed: int = 0) -> PromptTask:
    """The family as a task: the answer is what follows "A:" on the last line that begins so."""
    train: list[Prompt] = []
    test: list[Prompt] = []
    for parts in family.distinct(random.Random(f"{family.name} {seed}")):
        split, size = (test, test_size) if family.in_test(parts) else (train, train_size)
        if len(split) < size:
            split.append(family.prompt(parts))
        if len(train) == train_size and len(test) == test_size:
            break
    return PromptTask(name, train, test, exact(after_marker("A:")), lambda prompt: f"A:{prompt.answer}")


def sums(terms: int, largest: int = 20) -> Family:
    """Sums of so many terms of 1 … `largest`: "Q:12+5+20=⏎" → "37"."""
    return Family(
        name=f"sum{terms}",
        draw=lambda rng: tuple(rng.randint(1, largest) for _ in range(terms)),
        ask=lambda parts: f"Q:{'+'.join(map(str, parts))}=\n",
        answer=lambda parts: str(sum(parts)),
        key=lambda parts: tuple(sorted(parts)),
        every=(lambda: product(range(1, largest + 1), repeat=terms)) if largest**terms <= LISTED else None,
    )


def running_totals(parts: Sequence[int]) -> list[int]:
    """Totals after the second, third … term."""
    totals = [parts[0] + parts[1]]
    for term in parts[2:]:
        totals.append(totals[-1] + term)
    return totals


def _draw_subtraction(rng: random.Random) -> tuple[int, int]:
    first = rng.randint(2, 40)
    return first, rng.randint(1, first)


def _draw_text(alphabet: str, shortest: int, longest: int) -> Callable[[random.Random], tuple[str]]:
    def draw(rng: random.Random) -> tuple[str]:
        return ("".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest))),)

    return draw


SUMS = {terms: sums(terms) for terms in (2, 3, 4)}
SKILLS = {
    "subtract": Family(
        name="subtract",
        draw=_draw_subtraction,
        ask=lambda parts: f"Q:{parts[0]}-{parts[1]}=\n",
        answer=lambda parts: str(parts[0] - parts[1]),
        key=lambda parts: parts,
        every=lambda: ((first, second) for first in range(2, 41) for second in range(1, first + 1)),
    ),
    "sort": Family(
        name="sort",
        draw=_draw_text("0123456789", 3, 6),
        ask=lambda parts: f"S:{parts[0]}\n",
        answer=lambda parts: "".join(sorted(parts[0])),
        key=lambda parts: tuple(sorted(parts[0])),
    ),
    "reverse": Family(
        name="reverse",
        draw=_draw_text(LETTERS, 3, 6),
        ask=lambda parts: f"R:{parts[0]}\n",
        answer=lambda parts: parts[0][::-1],
        key=lambda parts: (min(parts[0], parts[0][::-1]),),
    ),
    "max": Family(
        name="max",
        draw=lambda rng: tuple(rng.randint(1, 99) for _ in range(rng.randint(2, 4))),
        ask=lambda parts: f"M:{','.join(map(str, parts))}\n",
        answer=lambda parts: str(max(parts)),
        key=lambda parts: tuple(sorted(parts)),
    ),
}
