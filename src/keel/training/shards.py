"""The tensors of a checkpoint as torch.distributed.checkpoint keeps them: every rank writes its own part, and any number of ranks
reads them back, each what it needs.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from keel.models.sharding import is_sharded
from keel.training.ranks import Ranks


def write(place: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Save into a new folder, all ranks together.

    Returns:
        The sha256 of every file in it, by name.
    """
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(place))
    names = ranks.by_first(lambda: sorted(path.name for path in place.iterdir()))
    return _digests(place, names, ranks)


def read(place: Path, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Every tensor that was saved: cut as `like` has it under its name, or whole. All of `ranks` read together.

    Raises:
        ValueError, OSError: a file is missing or unreadable.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(place)
    saved = reader.read_metadata().state_dict_metadata
    room = {name: _room(about, like.get(name)) for name, about in saved.items()}
    try:
        with _quiet():
            dcp.load(room, storage_reader=reader, no_dist=ranks.size == 1)
    except dcp.api.CheckpointException as fault:
        raise ValueError(str(fault).strip().splitlines()[-1]) from fault
    return room


def check(place: Path, digests: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse files that are not as they were written.

    Raises:
        ValueError: naming the first.
    """
    for name, found in _digests(place, sorted(digests), ranks).items():
        if found != digests[name]:
            raise ValueError(f"{name} has sha256 {found[:12]}… and not {digests[name][:12]}…")


def _digests(place: Path, names: list[str], ranks: Ranks) -> dict[str, str]:
    """Every rank reads some of the files."""

    def of(some: list[str]) -> list[tuple[str, str]]:
        return [(name, _digest(place / name)) for name in some]

    return dict(ranks.spread(of)(names))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _room(about, like: Tensor | None) -> Tensor:
    """Memory for one tensor; cut as the other one is, where that has its shape."""
    if like is not None and is_sharded(like) and like.shape == about.size:
        return torch.empty_like(like, dtype=about.properties.dtype, requires_grad=False)
    return torch.empty(about.size, dtype=about.properties.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns its own developers, and those who load in one process on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield
