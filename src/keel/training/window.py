"""Which batches may be sampled now: the bound on staleness, for whoever samples while the trainer goes on."""

from __future__ import annotations

from collections.abc import Sequence

from keel.config import RunConfig
from keel.errors import KeelError


class Window:
    """Batches in their order, each opened when its last update cannot be more than the bound behind the weights at hand.

    Args:
        config: resolved.
        version: of the weights at hand, and the step of the first batch.
        schedule: version of each batch, to replay a run exactly: it is opened at that version, and at no other.
    """

    def __init__(self, config: RunConfig, version: int, schedule: Sequence[int] | None = None):
        self.steps, self.schedule = config.steps, schedule
        self.updates = config.train.updates_per_batch or 1
        self.bound = max(config.train.max_staleness, self.updates - 1)  # in turn, later updates are stale by themselves
        self.first_step = self.next_step = version
        self.used: list[int] = []  # oldest version of each batch so far: a schedule that replays them

    def opened(self, version: int) -> int | None:
        """The step of the next batch, if it may begin with weights of this version; told once."""
        step = self.next_step
        if not self._may_begin(step, version):
            return None
        self.next_step += self.updates
        return step

    def use(self, step: int, version: int) -> None:
        """Train from `step` on with a batch whose oldest tokens are of this version.

        Raises:
            KeelError: it is too stale.
        """
        self.used.append(version)
        stale = step + self.updates - 1 - version
        if stale > self.bound:
            raise KeelError(
                f"The batch of step {step} was sampled with version {version} and would be {stale} versions stale at its "
                f"last update. Expected at most {self.bound}, as train.max_staleness has it: a replayed schedule that keeps it."
            )

    def _may_begin(self, step: int, version: int) -> bool:
        if step >= self.steps:
            return False
        if self.schedule is not None:
            number = (step - self.first_step) // self.updates
            return number < len(self.schedule) and self.schedule[number] == version
        return step + self.updates - 1 - version <= self.bound
