"""What a grader's errors do to training, from its chances to pass a right and a wrong answer.

Where an error hangs on nothing but whether the answer is right, E[verdict | y] = FPR + (TPR − FPR)·R(y). So for advantages that are
only centred the expected gradient is (TPR − FPR) times the true one, at every prompt. Divided by the group's std it is that times
c_G(p̃)/c_G(p) with p̃ the graded pass rate, which differs between prompts: hard and easy ones change their weight. `enumerated`
checks both by going through every group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RATES = (0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)


@dataclass(frozen=True)
class AtRate:
    """What is left of the signal of a prompt with this true pass rate.

    Args:
        graded: the pass rate that the grader sees, p·TPR + (1−p)·FPR.
        centred: factor on the true gradient with centred advantages.
        by_std: the same with advantages divided by the group's std.
        earned: of the answers that it rewards, how many are right.
        samples: how many times as many samples give the same signal-to-noise, where the size of ∇log π does not depend on whether
            the answer is right; infinite when nothing is left.
        dead_before, dead: share of groups without signal, by the truth and by the grader.
    """

    pass_rate: float
    graded: float
    centred: float
    by_std: float
    earned: float
    samples: float
    dead_before: float
    dead: float


def consequence(tpr: float, fpr: float, group_size: int = 8, rates: Sequence[float] = RATES) -> list[AtRate]:
    """What such a grader leaves of the policy gradient, prompt by prompt.

    `samples` is p̃(1−p̃) / (J²·p(1−p)), one over the square of the correlation between verdict and truth: the gradient's size is
    multiplied by J, and the noise that every direction of the gradient gets from the verdict's variance becomes p̃(1−p̃). It is an
    approximation: enumerated worlds of three tokens lie within 20 % of it.

    Args:
        tpr, fpr: chances to pass a right and a wrong answer.
        group_size: completions of a prompt, for the division by std.
    """
    return [_at(p, tpr, fpr, group_size) for p in rates]


def _at(p: float, tpr: float, fpr: float, group_size: int) -> AtRate:
    from keel.exact.truths import group_std_weight

    graded, j = p * tpr + (1 - p) * fpr, tpr - fpr
    spread = graded * (1 - graded)
    return AtRate(
        pass_rate=p,
        graded=graded,
        centred=j,
        by_std=j * group_std_weight(graded, group_size) / group_std_weight(p, group_size),
        earned=p * tpr / graded if graded > 0 else float("nan"),
        samples=spread / (j * j * p * (1 - p)) if j else math.inf,
        dead_before=p**group_size + (1 - p) ** group_size,
        dead=graded**group_size + (1 - graded) ** group_size,
    )


def enumerated(p: float, tpr: float, fpr: float, group_size: int = 4) -> tuple[float, float]:
    """The two factors again, by the expectation of the losses that train over every group that can be drawn.

    Returns:
        factor with centred advantages (leave-one-out), factor with the group's std, each along the true gradient.
    """
    from keel.exact.expectation import expect
    from keel.exact.world import World
    from keel.objectives.advantages import Advantage, GroupStd, group_mean, leave_one_out
    from keel.objectives.aggregate import constant_length_mean
    from keel.objectives.objective import Objective

    def direction(advantage: Advantage, tpr: float, fpr: float) -> Tensor:
        world = World.of_pass_rates([p], group_size=group_size, tpr=tpr, fpr=fpr)
        return expect(world, Objective(advantage=advantage, aggregate=constant_length_mean)).direction

    found = []
    for advantage in (leave_one_out, Advantage(group_mean, GroupStd(1, 1e-4))):
        true, graded = direction(advantage, 1.0, 0.0), direction(advantage, tpr, fpr)
        found.append(float(true @ graded / (true @ true)))
    return found[0], found[1]
