"""Batches between processes: as pickle has them, but each tensor as its plain bytes.

torch writes every tensor as an archive of its own, which for a batch of 256 completions takes longer than sampling them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Writer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return _tensor, (value.cpu().contiguous().numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def dumps(value: Any) -> bytes:
    """Anything that pickle takes, tensors without gradients included. bfloat16 is not: numpy has none."""
    out = io.BytesIO()
    _Writer(out, pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` was given; tensors own their memory."""
    return pickle.loads(data)
