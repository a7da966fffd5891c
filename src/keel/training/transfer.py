"""Batches between processes: as pickle has them, but each tensor as its plain bytes.

torch writes every tensor as an archive of its own, which for a batch of 256 completions takes longer than sampling them.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, tuple[np.ndarray, str, tuple[int, ...]]]  # bytes, dtype, shape


class _Writer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return _tensor, (value.cpu().contiguous().numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def as_arrays(weights: Mapping[str, Tensor]) -> Arrays:
    """Tensors as plain bytes with their kind, without a copy where they lie in main memory. What shares memory stays shared."""
    seen: dict[tuple[int, int], np.ndarray] = {}
    found = {}
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        data = seen.setdefault((plain.data_ptr(), plain.nbytes), plain.reshape(-1).view(torch.uint8).numpy())
        found[name] = data, str(plain.dtype).removeprefix("torch."), tuple(plain.shape)
    return found


def from_arrays(arrays: Arrays) -> dict[str, Tensor]:
    """The tensors, in the memory of the arrays: read them, never write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors, and says so
        plain = {name: torch.from_numpy(data) for name, (data, _, _) in arrays.items()}
    return {name: plain[name].view(getattr(torch, kind)).view(shape) for name, (_, kind, shape) in arrays.items()}


def dumps(value: Any) -> bytes:
    """Anything that pickle takes, tensors without gradients included. bfloat16 is not: numpy has none."""
    out = io.BytesIO()
    _Writer(out, pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` was given; tensors own their memory."""
    return pickle.loads(data)
