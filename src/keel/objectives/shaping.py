"""What happens to rewards and masks before advantages: truncated and overlong completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from keel.errors import KeelError
from keel.objectives.signals import Scored, keep
from keel.types import Batch

Shaping = Callable[[Scored, Batch, int], Scored]


@dataclass(frozen=True)
class OverlongFilter:
    """A truncated completion gives no loss: its answer was cut off, not wrong.

    Args:
        in_baseline: whether its reward still enters the statistics of its group and batch.

    Source: DAPO, arXiv 2503.14476, §3.4. Differs from it: whether it stays in the baseline, unsaid there, is an option;
    by default not.
    """

    in_baseline: bool = False

    def __call__(self, scored: Scored, batch: Batch, max_tokens: int) -> Scored:
        whole = ~batch.truncated
        counted = scored.counted if self.in_baseline else scored.counted & whole
        return replace(scored, counted=counted, mask=scored.mask & whole[:, None])


@dataclass(frozen=True)
class SoftOverlong:
    """The soft overlong punishment, added to the reward: with cap L and buffer c = buffer_share · L,

    0 up to L − c tokens, then ((L − c) − |y|)/c down to −1 at L, and −1 beyond; times `scale`.

    Args:
        buffer_share: c/L in (0, 1]; .2 is 4,096 of 20,480 tokens.
        scale: reward lost at the cap. .5 is the paper's −1 where rewards are 0 and 1 instead of −1 and 1.

    Source: DAPO, arXiv 2503.14476, eq. 13. Differs from it: the buffer is a share of the cap, and `scale`.
    """

    buffer_share: float = 0.2
    scale: float = 1.0

    def __post_init__(self):
        if not (0 < self.buffer_share <= 1 and self.scale > 0):
            raise KeelError(
                f"{self!r}: expected 0 < buffer_share ≤ 1 and scale > 0. The buffer is the share of the length cap in "
                "which the punishment grows; longer than the cap it would punish an empty completion."
            )

    def __call__(self, scored: Scored, batch: Batch, max_tokens: int) -> Scored:
        buffer = max(1, round(self.buffer_share * max_tokens))
        length = batch.completion_len.to(scored.reward.dtype)
        punishment = ((max_tokens - buffer - length) / buffer).clamp(-1.0, 0.0)
        return replace(scored, reward=scored.reward + keep(self.scale * punishment, scored.counted))
