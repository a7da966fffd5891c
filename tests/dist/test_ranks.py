"""Two real processes train as one does: the same weights, numbers, skips and checkpoints, and none waits for ever."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import two_ranks  # noqa: E402
from launching import ENVIRONMENT, HERE, ranks_of, torchrun  # noqa: E402
from stored import make_policy  # noqa: E402

from keel.training import checkpoint  # noqa: E402
from keel.training.ranks import ALONE  # noqa: E402

MODES = ("ddp", "fsdp")
ROUGH = {"policy fp32": 1e-5, "policy mixture": 1e-6}  # a router's softmax is always in 32 bits


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(mode, rank) → what that rank says of every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = ranks_of("two_ranks.py", folder, *MODES, limit_s=500)
    assert codes == [0, 0], "\n".join(said)
    return {(m, n): torch.load(folder / f"{m}-{n}.pt", weights_only=False) for m in MODES for n in (0, 1)} | {"folder": folder}


@pytest.fixture(scope="module")
def alone():
    """The same scenarios in this process."""
    return two_ranks.compared(ALONE)


def near(found, expected, rtol):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * float(tensor.abs().max()), msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", two_ranks.CASES)
def test_same_weights_as_one_process(told, alone, mode, case):
    """Weights after up to 20 steps, on both ranks; and they did move."""
    weights, _ = alone[case]
    start = make_policy(**two_ranks.POLICIES[two_ranks.CASES[case][2]]).weights()
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights.items())
    for rank in (0, 1):
        near(told[mode, rank]["compared"][case][0], weights, ROUGH.get(case, 1e-10))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in two_ranks.CASES if case not in ROUGH])
def test_same_metrics_as_one_process(told, alone, mode, case):
    """Gradient norms, losses and everything that is measured: not means of means, but the same numbers."""
    for rank in (0, 1):
        for found, expected in zip(told[mode, rank]["compared"][case][1], alone[case][1], strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if not name.startswith("time/"):
                    assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name


def test_clipping_bound_where_it_was_to(alone):
    assert all(metrics["train/grad_norm"] > 1e-3 for metrics in alone["clipped"][1])


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_on_one_rank_skips_the_step_on_all(told, mode):
    for rank in (0, 1):
        before, after, end, skipped = told[mode, rank]["broken"]
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
        assert any(not torch.equal(before[name], tensor) for name, tensor in end.items())
        assert [(bool(name), count) for name, count in skipped] == [(False, 0), (True, 1), (False, 1)]
    assert told[mode, 0]["broken"][3] == told[mode, 1]["broken"][3]


def test_ranks_made_different_numbers_of_micro_batches(told):
    (cuts, idle), (others, others_idle) = told["fsdp", 0]["passes"]
    assert cuts != others and cuts + idle == others + others_idle
    assert [idle for _, idle in told["ddp", 0]["passes"]] == [0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_resumed_on_as_many_ranks_is_the_same_bit_for_bit(told, mode):
    for rank in (0, 1):
        whole, same, _, _ = told[mode, rank]["checkpoints"]
        assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(told, mode):
    for rank in (0, 1):
        whole, _, changed, kinds = told[mode, rank]["checkpoints"]
        near(changed, whole, 1e-10)
        of_two = ["shards", "state.json"] if mode == "fsdp" else ["state.json", "tensors.safetensors"]
        assert kinds == {"step-00000003": of_two, "step-00000006": ["state.json", "tensors.safetensors"]}


def test_one_process_reads_a_sharded_checkpoint(told):
    step, tensors, state = checkpoint.load(told["folder"] / "checkpoints-fsdp", 3)
    policy = make_policy()
    assert step == state["clocks"]["step"] == 3
    assert {f"weights.{name}": p.shape for name, p in policy.parameters().items()}.items() <= {
        name: tensor.shape for name, tensor in tensors.items()
    }.items()


def test_a_damaged_shard_is_refused(told, tmp_path):
    shutil.copytree(told["folder"] / "checkpoints-fsdp", tmp_path / "copy")
    part = next((tmp_path / "copy" / "step-00000003" / "shards").glob("*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: .*sha256"):
        checkpoint.load(tmp_path / "copy", 3)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_sample_what_one_process_samples(told, mode):
    """Five prompts on two ranks; and one, so that a rank has none."""
    expected = [two_ranks.sampled(ALONE, prompts) for prompts in (5, 1)]
    assert told[mode, 0]["sampled"] == told[mode, 1]["sampled"] == expected


def test_ranks_that_differ_are_refused_by_name(told):
    for rank in (0, 1):
        assert "differ in torch (rank 0: 2.0, rank 1: 2.1)" in told["ddp", rank]["differ"]
        assert "numpy" not in told["ddp", rank]["differ"]


def test_what_fails_on_one_rank_fails_on_all(told):
    assert told["ddp", 1]["failed"] == "the disk is full"
    assert "Rank 1 of 2 failed" in told["ddp", 0]["failed"] and "the disk is full" in told["ddp", 0]["failed"]


def test_a_rank_that_died_is_not_waited_for(tmp_path):
    begin = time.monotonic()
    codes, said = ranks_of("one_dies.py", tmp_path, limit_s=90)
    assert codes == [2, 0], "\n".join(said)
    assert "lost one another" in said[0]
    assert float((tmp_path / "waited").read_text()) < 30, time.monotonic() - begin


def test_a_process_that_ends_is_not_taken_down_by_what_it_sent_last(tmp_path):
    """Without waiting for gloo to let go, two to five of these twelve pairs aborted."""
    done = subprocess.run(
        [sys.executable, str(HERE / "they_leave.py"), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


SMALL = [
    "--task", "arithmetic:easy", "--train.prompts_per_step", "3", "--train.group_size", "4", "--evaluation.prompts", "3",
    "--evaluation.samples", "2", "--evaluation.every", "0", "--evaluation.standard_panel", "false", "--checkpoint.every", "0",
]  # fmt: skip


def keel(*words):
    run = [sys.executable, "-m", "keel", *map(str, words)]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def rows(folder, file="metrics.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_a_run_goes_on_on_other_numbers_of_ranks(tmp_path):
    """Begun on two ranks, gone on with on one, then on two; against a run of one process. Three prompts: an uneven split."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    keel("train", "solid", *SMALL, "--steps", 3, "--out", whole)
    code, said = torchrun(tmp_path, "train", "solid", *SMALL, "--steps", 1, "--train.parallel", "fsdp", "--out", moved)
    assert code == 0, said
    assert said.count("held out") == 1  # one rank speaks
    keel("train", "--resume", moved, "--steps", 2)
    code, said = torchrun(tmp_path, "train", "--resume", moved, "--steps", 3, "--train.parallel", "ddp")
    assert code == 0, said
    assert json.loads((moved / "manifest.json").read_text())["ranks"] == 2
    assert rows(whole, "rollouts.jsonl") == rows(moved, "rollouts.jsonl")
    one, two = ([row for row in rows(each) if "train/grad_norm" in row] for each in (whole, moved))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3]
    for name in ("reward/mean", "length/mean", "tokens/step", "train/grad_norm", "policy/entropy_nats"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], rel=1e-3), name


def test_a_sharded_policy_is_handed_back_while_its_processes_reach_one_another(tmp_path):
    codes, said = ranks_of("after_a_run.py", tmp_path)
    assert codes == [0, 0], "\n".join(said)
    for rank in (0, 1):
        told = torch.load(tmp_path / f"after-{rank}.pt", weights_only=False)
        assert told["kept"] == pytest.approx(told["read"]) and told["parted"] is None
        assert told["read again"].keys() == told["read"].keys()


def test_several_processes_without_a_way_to_train_together_are_refused(tmp_path):
    code, said = torchrun(tmp_path, "train", "solid", *SMALL, "--out", tmp_path / "run", limit_s=60)
    assert code != 0 and "2 processes were started, and train.parallel is none" in said
    assert not (tmp_path / "run").exists()


def test_one_process_for_a_parallel_run_is_refused(tmp_path):
    words = [sys.executable, "-m", "keel", "train", "solid", "--train.parallel", "ddp", "--out", str(tmp_path / "run")]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "torchrun --nproc-per-node 2" in done.stderr
