"""Steps of fixed shape that are launched as one: on a CUDA card, as graphs of their kernels.

A decoding step is some hundreds of small kernels, and a card does each sooner than Python can ask for it. A graph asks once. It
replays the same kernels on the same memory, so a step to be captured reads what changes from tensors that stay where they are, and
takes no decision by their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[Callable[[], object], T]]  # a step → what launches it, and where its answer will be


class Captured:
    """Launches a step that was recorded once for each of its shapes. What it returns is overwritten by the next call.

    The first call with a shape runs the step plainly, for libraries prepare themselves then, and a shape that never comes back is
    not worth more; the second records it.

    Args:
        record: how; recording need not run the step.
    """

    def __init__(self, record: Record):
        self.record = record
        self.met: set[tuple[int, ...]] = set()
        self.recorded: dict[tuple[int, ...], tuple[Callable[[], object], Any]] = {}

    def __call__(self, step: Callable[..., T], *shape: int) -> T:
        """What the step returns for these integers; always the same step, which is not kept."""
        if shape not in self.met:
            self.met.add(shape)
            return step(*shape)
        if shape not in self.recorded:
            self.recorded[shape] = self.record(lambda: step(*shape))
        launch, answer = self.recorded[shape]
        launch()
        return answer


def cuda_graphs() -> Record:
    """Records CUDA graphs that share one pool of memory: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            answer = step()
        return graph.replay, answer

    return record


def padded_rows(rows: int, most: int) -> int:
    """The next power of two, or `most`: few shapes, each met often."""
    return min(1 << (rows - 1).bit_length(), most)


def padded_columns(columns: int, most: int, grain: int = 256) -> int:
    """The next multiple of `grain`, or `most`."""
    return min(-(-columns // grain) * grain, most)
