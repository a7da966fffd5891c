"""A pass-rate curriculum: prompts are drawn more often where right and wrong answers are both likely.

Pure functions over three arrays: which prompts there are, and how often each was tried and solved. `train.curriculum` asks for it
(`training.buffer.CurriculumStream`). Drawing by weight changes the objective to Σ w·J_p, with w following the policy; `importance`
is the factor on a prompt's advantages that changes it back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from keel.errors import KeelError

FLOOR = 0.25  # share of the draws that is spread over all prompts alike: pass rates move, and are to be measured again
MEMORY = 0.5  # share of what was counted before that still counts after a prompt was tried again


@dataclass(frozen=True)
class Record:
    """How often each prompt was tried and solved; recent tries count more.

    Args:
        right, tries: [P] counts, each old one times `MEMORY` for every time that the prompt was tried since.
    """

    right: Float[np.ndarray, " P"]
    tries: Float[np.ndarray, " P"]

    @classmethod
    def empty(cls, prompts: int) -> Record:
        """Nothing tried: every prompt is as promising as another."""
        return cls(np.zeros(prompts), np.zeros(prompts))

    def updated(
        self, index: Int[np.ndarray, " N"], right: Float[np.ndarray, " N"], tries: Float[np.ndarray, " N"], memory: float = MEMORY
    ) -> Record:
        """After these prompts were tried (each of them once in `index`): `right` of `tries` scored completions were right.

        A prompt without a scored completion stays as it was.
        """
        seen, solved, tried = tries > 0, self.right.copy(), self.tries.copy()
        place = index[seen]
        solved[place] = memory * solved[place] + right[seen]
        tried[place] = memory * tried[place] + tries[seen]
        return Record(solved, tried)


def information(right: Float[np.ndarray, " P"], tries: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """Expected p(1−p) of each prompt: half the chance that two of its completions differ, and the size of its gradient.

    Under the posterior Beta(right + 1, tries − right + 1), so a prompt that was solved 0 times of 4 is worth some tries more.
    """
    a, b = right + 1.0, tries - right + 1.0
    return a * b / ((a + b) * (a + b + 1.0))


def weights(record: Record, floor: float = FLOOR) -> Float[np.ndarray, " P"]:
    """Share of the draws that each prompt gets: `floor` of them alike, the others by information. They sum to 1.

    Raises:
        KeelError: a floor outside 0 < floor ≤ 1. With 0 a prompt could be given up for ever on few tries.
    """
    if not 0.0 < floor <= 1.0:
        raise KeelError(f"The curriculum's floor is {floor}. Expected a share above 0 and at most 1: 1 draws all prompts alike.")
    worth = information(record.right, record.tries)
    return (1.0 - floor) * worth / worth.sum() + floor / len(worth)


def draw(weight: Float[np.ndarray, " P"], count: int, seed: int, taken: int) -> Int[np.ndarray, " count"]:
    """Different prompts, drawn one after another with chances proportional to the weights of those that are left.

    The same seed and number of prompts taken before give the same draw, so a run that goes on needs no generator's state.

    Raises:
        KeelError: more prompts than there are.

    Source: P. Efraimidis, P. Spirakis, Information Processing Letters 97 (2006). Differs from it: in nothing.
    """
    if count > len(weight):
        raise KeelError(
            f"A curriculum of {len(weight)} prompts was asked for {count} different ones. Lower train.prompts_per_step."
        )
    late = np.random.default_rng([seed, taken]).exponential(size=len(weight)) / weight
    return np.argsort(late, kind="stable")[:count]


def importance(weight: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """Factor on each prompt's advantages under which the expected gradient is that of all prompts alike: 1 / (P·w).

    At most 1/floor. Exact for draws with replacement; for a batch that is a small part of the prompts nearly so.
    """
    return 1.0 / (len(weight) * weight)
