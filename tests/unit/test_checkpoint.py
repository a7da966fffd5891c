"""Checkpoints: bit for bit, whole or not there, and clear about damage."""

from __future__ import annotations

import os
import random
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from keel.errors import KeelError
from keel.training import checkpoint

TENSORS = {
    "weights.a": torch.tensor([1.0, float("nan"), -0.0, 1e-45]),
    "optimizer.step": torch.tensor(7.0),
    "half": torch.arange(4).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
STATE = {"step": 7, "prompts_taken": 224, "exact": 0.1 + 0.2, "nested": {"list": [1, None, "é"]}}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path, 7, TENSORS, STATE)
    step, tensors, state = checkpoint.load(tmp_path)
    assert (step, state) == (7, STATE)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(tensors[name]) == bits(tensor), name


def test_tensors_that_share_memory_or_have_gaps_are_saved(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tied = {"embed": whole, "head": whole, "column": whole[:, 1], "transposed": whole.T, "row": whole[1]}
    checkpoint.save(tmp_path, 1, tied, {})
    loaded = checkpoint.load(tmp_path)[1]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tied.items())


def test_the_newest_few_are_kept_and_latest_names_the_newest(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, {"w": torch.tensor([float(step)])}, {}, keep=2)
    assert names(tmp_path) == {"step-00000020", "step-00000030", "latest"}
    assert checkpoint.load(tmp_path)[1]["w"].item() == 30.0
    assert checkpoint.load(tmp_path, 20)[1]["w"].item() == 20.0


def test_a_run_that_went_back_writes_its_step_anew(tmp_path):
    checkpoint.save(tmp_path, 10, {"w": torch.tensor([1.0])}, {})
    checkpoint.save(tmp_path, 10, {"w": torch.tensor([2.0])}, {})
    assert checkpoint.load(tmp_path)[1]["w"].item() == 2.0


def test_a_missing_pointer_falls_back_to_the_newest_folder(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(1)}, {})
    shutil.rmtree(tmp_path / "step-00000020")
    assert checkpoint.load(tmp_path)[0] == 10
    (tmp_path / "latest").unlink()
    assert checkpoint.load(tmp_path)[0] == 10


def test_drafts_of_a_killed_process_are_no_checkpoints_and_go_away(tmp_path):
    (tmp_path / ".draft-step-00000099-1").mkdir(parents=True)
    (tmp_path / ".draft-latest-1").write_text("step-00000099")
    with pytest.raises(KeelError, match="no checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, 1, {"w": torch.zeros(1)}, {})
    assert names(tmp_path) == {"step-00000001", "latest"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, os.unlink])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_damage_is_named_and_the_whole_ones_too(tmp_path, damage, file):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, {"w": torch.arange(9.0)}, {"step": step})
    damage(tmp_path / "step-00000020" / file)
    with pytest.raises(KeelError, match=r"step-00000020 is damaged.*steps \[10\]"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path, 10)[0] == 10


def test_an_unknown_step_names_those_that_are_there(tmp_path):
    checkpoint.save(tmp_path, 10, {}, {})
    with pytest.raises(KeelError, match=r"no checkpoint of step 11.*\[10\]"):
        checkpoint.load(tmp_path, 11)


def test_state_that_json_cannot_say_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, 1, {}, {"x": float("nan")})
    assert names(tmp_path) == set()


@contextmanager
def files_of_at_most(size: int):
    """The system refuses to let any file grow beyond this many bytes, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_the_last_checkpoint_and_no_half_of_a_new_one(tmp_path):
    checkpoint.save(tmp_path, 10, {"w": torch.ones(10)}, {})
    with pytest.raises(KeelError, match="no room on the disk for the checkpoint of step 20"), files_of_at_most(4096):
        checkpoint.save(tmp_path, 20, {"w": torch.ones(100_000)}, {})
    assert names(tmp_path) == {"step-00000010", "latest"}
    assert torch.equal(checkpoint.load(tmp_path)[1]["w"], torch.ones(10))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(KeelError, match="could not be written"):
        checkpoint.save(tmp_path / "checkpoints", 1, {}, {})


def draws() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(2).tolist(), np.random.normal(), random.random(), random.gauss(0, 1)


def test_every_global_generator_goes_on_where_it_was(tmp_path):
    np.random.normal(), random.gauss(0, 1)  # both keep a second draw in store
    tensors, state = checkpoint.random_state()
    expected = draws()
    checkpoint.save(tmp_path, 1, tensors, {"random": state})
    _, tensors, state = checkpoint.load(tmp_path)
    checkpoint.restore_random_state(tensors, state["random"])
    assert draws() == expected
