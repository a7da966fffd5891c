"""Checkpoints that are whole or not there: written beside, flushed to disk, then renamed into place.

A folder of checkpoints holds `step-00000050/` (tensors.safetensors, state.json), older ones, and `latest`, which names
the newest. Of a policy that is cut over ranks, each rank writes its own part, into `shards/` in place of tensors.safetensors.
A process that is killed at any instruction leaves the last whole checkpoint readable; a full disk leaves it untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from keel.errors import KeelError
from keel.files import disk_error, flush, flush_folder, write_atomically
from keel.models.sharding import is_sharded
from keel.training import shards
from keel.training.ranks import ALONE, Ranks

FORMAT = 1


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2, ranks: Ranks = ALONE
) -> Path:
    """Write one checkpoint, point `latest` at it, and drop all but the `keep` newest.

    Args:
        folder: of all checkpoints of one run; made if need be.
        step: optimizer steps done.
        tensors: saved bit for bit.
        state: JSON-able; floats come back exactly.
        ranks: all of them have to call this. What is not cut over them, the first one writes.

    Returns:
        The new checkpoint's own folder.

    Raises:
        KeelError: the disk is full. The checkpoints that were there still are, and nothing half-written is left.
    """
    folder = Path(folder)
    target, draft = folder / _name(step), folder / f".draft-{_name(step)}-{ranks.by_first(os.getpid)}"
    try:
        ranks.by_first(lambda: _begin(folder, draft))
        if any(map(is_sharded, tensors.values())):
            digest: Any = shards.write(draft / "shards", tensors, ranks)
        else:
            digest = ranks.by_first(lambda: _write(draft / "tensors.safetensors", tensors))
        ranks.by_first(lambda: _end(draft, target, {"format": FORMAT, "step": step, "sha256": digest, "state": dict(state)}, keep))
    except OSError as fault:
        shutil.rmtree(draft, ignore_errors=True)
        raise disk_error(fault, f"checkpoint of step {step}", folder) from fault
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def load(
    folder: Path, step: int | None = None, like: Mapping[str, Tensor] | None = None, ranks: Ranks = ALONE
) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint, or that of one step: (step, tensors, state), bit for bit as saved.

    Args:
        like: by name, tensors that are cut over ranks. What was saved in parts is read cut like them, each rank its own; all else
            is read whole by every rank.

    Raises:
        KeelError: there is none, or its files are damaged (then it says which whole ones remain).
    """
    folder = Path(folder)
    step = newest(folder) if step is None else step
    place = folder / _name(step)
    if step not in checkpoints(folder):
        raise KeelError(f"There is no checkpoint of step {step} in {folder}. Expected one of {checkpoints(folder)}.")
    try:
        record = json.loads((place / "state.json").read_text(encoding="utf-8"))
        return record["step"], _read(place, record["sha256"], like or {}, ranks), record["state"]
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        others = [s for s in checkpoints(folder) if s != step]
        remain = f"Whole ones may remain at steps {others}" if others else "No other one remains"
        raise KeelError(
            f"The checkpoint {place} is damaged: {fault}. Expected state.json and tensors.safetensors (or shards/) with the "
            f"sha256 that it names. {remain}: delete {place.name} to go on from the newest of them, or start the run "
            "anew."
        ) from fault


def newest(folder: Path) -> int:
    """Step of the newest whole checkpoint: the one that `latest` names, or else the highest that is there.

    Raises:
        KeelError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise KeelError(f"There is no checkpoint in {folder}. Expected a folder such as {_name(50)}. Is this the run you meant?")
    pointer = Path(folder) / "latest"
    named = _step(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else None
    return named if named in found else found[-1]


def checkpoints(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, ascending."""
    if not Path(folder).is_dir():
        return []
    steps = (_step(path.name) for path in Path(folder).iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def seed_random_state(seed: int) -> None:
    """Seed every global random generator. keel's own draws carry their keys with them; a user's task or reward may not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every global random generator's state, as tensors and JSON. Training draws from keyed seeds; this covers what
    plugins use.
    """
    _, keys, *rest = np.random.get_state()
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    return tensors, {"numpy": rest, "python": [version, list(internal), gauss]}


def random_states(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`random_state` of every rank; those of ranks after the first under the rank's number."""
    (tensors, state), *others = ranks.gather(random_state)
    for rank, (their_tensors, their_state) in enumerate(others, start=1):
        tensors |= {f"rank{rank}.{name}": tensor for name, tensor in their_tensors.items()}
        state[f"rank{rank}"] = their_state
    return tensors, state


def restore_random_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any], rank: int = 0) -> None:
    """Put every global random generator back to where `random_states` found it; a rank that was not there keeps its own."""
    if rank:
        tensors = {name.removeprefix(f"rank{rank}."): t for name, t in tensors.items() if name.startswith(f"rank{rank}.")}
        state = state.get(f"rank{rank}", {})
    if not state:
        return
    torch.set_rng_state(tensors["random.torch"])
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda.")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)


def _begin(folder: Path, draft: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    draft.mkdir()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors; its sha256."""
    with _plain_os_errors():
        save_file(_apart(tensors), path)
    return _digest(path)


def _end(draft: Path, target: Path, record: Mapping[str, Any], keep: int) -> None:
    """Write what belongs to the tensors, and put all of it in place."""
    text = json.dumps(record, allow_nan=False)
    (draft / "state.json").write_text(text, encoding="utf-8")
    for written in draft.rglob("*"):
        (flush_folder if written.is_dir() else flush)(written)
    flush_folder(draft)
    _put_in_place(draft, target)
    write_atomically(target.parent / "latest", target.name + "\n")
    for old in checkpoints(target.parent)[:-keep]:
        _discard(target.parent / _name(old))


def _read(place: Path, digest: Any, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    if (place / "shards").is_dir():
        shards.check(place / "shards", digest, ranks)
        return shards.read(place / "shards", like, ranks)
    _check_digest(place / "tensors.safetensors", digest)
    return load_file(place / "tensors.safetensors")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory: the file format has no views."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        where = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if where in seen else plain
        seen.add(where)
    return out


@contextmanager
def _plain_os_errors() -> Iterator[None]:
    """safetensors reports a failed write in words that end in "(os error N)"; this gives the error its number back."""
    try:
        yield
    except SafetensorError as fault:
        number = re.search(r"os error (\d+)", str(fault))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from fault


def _put_in_place(draft: Path, target: Path) -> None:
    """Rename the draft; a checkpoint of the same step (of a run that went back) makes way first."""
    if target.exists():
        _discard(target)
    os.rename(draft, target)
    flush_folder(target.parent)


def _discard(place: Path) -> None:
    """Take a checkpoint out of sight in one rename, then delete it at leisure."""
    trash = place.with_name(f".trash-{place.name}-{os.getpid()}")
    os.rename(place, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Drafts and trash of a process that was killed."""
    for pattern in (".draft-*", ".trash-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_digest(path: Path, expected: str) -> None:
    found = _digest(path)
    if found != expected:
        raise ValueError(f"{path.name} has sha256 {found[:12]}… and not {expected[:12]}…")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(name: str) -> int | None:
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found[1]) if found else None
