"""Which batches may be sampled now: under a bound, in turn, and by a schedule."""

import pytest

from keel.config import RunConfig
from keel.errors import KeelError
from keel.training.window import Window


def opened(window: Window, version: int) -> list[int]:
    return list(iter(lambda: window.opened(version), None))


def window(steps: int = 20, version: int = 0, schedule=None, **changes) -> Window:
    return Window(RunConfig(steps=steps).replaced(changes).resolved(), version, schedule)


def test_in_turn_a_batch_opens_when_its_weights_are_there():
    turn = window()
    assert opened(turn, 0) == [0] and opened(turn, 0) == [] and opened(turn, 1) == [1]
    several = window(**{"train.updates_per_batch": 4})
    assert opened(several, 0) == [0] and opened(several, 3) == [] and opened(several, 4) == [4]


def test_ahead_as_many_as_the_bound_allows():
    ahead = window(steps=5, **{"train.max_staleness": 2})
    assert opened(ahead, 0) == [0, 1, 2]  # batch 3 would be 3 versions old
    assert opened(ahead, 2) == [3, 4] and opened(ahead, 9) == []  # five steps in all
    several = window(**{"train.max_staleness": 3, "train.updates_per_batch": 2})
    assert opened(several, 0) == [0, 2]  # the last update of batch 2 is step 3


def test_what_was_used_is_kept_and_a_stale_batch_is_refused():
    ahead = window(version=4, **{"train.max_staleness": 2})
    ahead.use(4, 4)
    ahead.use(5, 3)
    with pytest.raises(KeelError, match="sampled with version 3 and would be 3 versions stale"):
        ahead.use(6, 3)
    assert ahead.used == [4, 3, 3]


def test_a_schedule_opens_each_batch_at_its_version():
    replay = window(schedule=[0, 0, 2], **{"train.max_staleness": 2})
    assert opened(replay, 0) == [0, 1] and opened(replay, 1) == [] and opened(replay, 2) == [2] and opened(replay, 3) == []
