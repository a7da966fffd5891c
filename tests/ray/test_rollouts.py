"""Rollout workers on a real Ray cluster: what is sampled does not depend on who samples it, or on who is killed meanwhile."""

from __future__ import annotations

import signal
import socket
import time

import pytest
import torch
from clusters import TRAINER, WORKER, at_work, until
from runs import begun, check_whole, expected_ids, settings_of, step_of

from keel import ray_cluster
from keel.config import RunConfig
from keel.errors import KeelError
from keel.models.load import load_policy
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training import ray_rollouts
from keel.training.checkpoint import checkpoints
from keel.training.loop import Trainer, iterate


def trainer_of(settings: RunConfig) -> Trainer:
    policy = load_policy(settings.model, seed=settings.seed)
    return Trainer(policy, LocalEngine(policy), get_task(settings.task), settings.chosen(), settings)


def train(settings: RunConfig, meanwhile=lambda trainer, record: None):
    """Records, final weights, and the trainer, whose workers have ended."""
    trainer = trainer_of(settings)
    try:
        records = []
        for record in iterate(trainer):
            records.append(record)
            meanwhile(trainer, record)
        return records, {name: p.detach().clone() for name, p in trainer.parameters.items()}, trainer.rollouts
    finally:
        trainer.close()


def ids_of(records) -> list[str]:
    return [group.prompt.id for record in records for group in record.groups]


def tokens_of(record) -> list[list[int]]:
    return [c.token_ids.tolist() for group in record.groups for c in group.completions]


@pytest.mark.parametrize(
    "changes", [{}, {"train.dynamic_sampling": True, "train.updates_per_batch": 2, "train.prompts_per_step": 2}]
)
def test_in_turn_two_workers_make_what_one_process_makes(cluster, changes):
    settings = settings_of(cluster, steps=4, **changes)
    records, weights, _ = train(settings)
    alone, same, _ = train(settings.replaced({"cluster.ray": "", "cluster.rollout_workers": 1}))
    assert ids_of(records) == ids_of(alone) and [tokens_of(r) for r in records] == [tokens_of(r) for r in alone]
    assert all(torch.allclose(weights[name], same[name], atol=1e-6) for name in weights)
    assert records[0].metrics["time/sample_s"] > 0 and records[-1].metrics["train/staleness_max"] == len(changes) // 2


def test_the_bound_holds_and_prompts_come_in_order(cluster):
    settings = settings_of(cluster, steps=8, **{"train.max_staleness": 2})
    records, _, rollouts = train(settings)
    ages = [record.metrics["train/staleness_max"] for record in records]
    assert ids_of(records) == expected_ids(settings, 8)
    assert max(ages) <= 2 and ages == [step - version for step, version in enumerate(rollouts.window.used)]
    until(lambda: not at_work(cluster))


GRADER = """
import os, signal
from dataclasses import replace
import torch
from keel.tasks.task import get_task, register

FATAL = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda: bytearray(1 << 60),
    "tensor": lambda: torch.empty(1 << 58),
}

def fatal(variant):
    return replace(get_task("arithmetic:medium"), name=f"fatal:{variant}", grade=lambda prompt, text: FATAL[variant](), checked=0)

register("fatal", fatal)
"""


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("killed", "3 rollout workers died one after another on the same 4 prompts.*Expected another.*lower engine.kv_cache_gb"),
        ("memory", "failed on .*out of memory .MemoryError.*Expected room for one more model.*lower engine.kv_cache_gb"),
        ("tensor", "failed on .*out of memory .*tried to allocate.*Expected room for one more model"),
    ],
)
def test_what_no_worker_survives_ends_the_run(cluster, tmp_path, monkeypatch, variant, said):
    (tmp_path / "fatal_grader.py").write_text(GRADER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    start = time.monotonic()
    with pytest.raises(KeelError, match=said):
        train(settings_of(cluster, plugins=("fatal_grader",), task=f"fatal:{variant}", **{"cluster.rollout_workers": 1}))
    assert time.monotonic() - start < 120
    until(lambda: not at_work(cluster))


def test_another_torch_on_a_worker_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_rollouts, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(KeelError, match="it has torch .*, and the process that started it has 1.0. Expected the same.*Install"):
        train(settings_of(cluster))


def test_another_ray_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "TRY", f"import ray; ray.__version__ = '1.0'; {ray_cluster.TRY}")
    with pytest.raises(KeelError, match="has Ray 2.* and Python 3.*, and this process has Ray 1.0 .*Expected the same"):
        train(settings_of(cluster))


def test_more_workers_than_the_cluster_can_hold_are_refused(cluster):
    with pytest.raises(KeelError, match="4 rollout workers need 4 CPU, and the Ray cluster has 3. Expected room.*lower"):
        train(settings_of(cluster, **{"cluster.rollout_workers": 4}))


def test_workers_for_whom_there_is_no_room_now_are_given_up(cluster):
    assert cluster.ask("hold") == 0
    try:
        with pytest.raises(KeelError, match="0 of 2 rollout workers began within 2 s; 0 CPUs of the Ray cluster are free"):
            train(settings_of(cluster, **{"cluster.start_s": 2.0}))
    finally:
        cluster.ask("free")
    until(lambda: cluster.ask("how are you") == 3)


@pytest.mark.parametrize(("address", "said"), [("127.0.0.1:1", "Nothing listens"), ("local", "keel starts no Ray cluster")])
def test_an_address_without_a_cluster_is_told(cluster, address, said):
    with pytest.raises(KeelError, match=f"{said}.*ray start --head"):
        train(settings_of(cluster, **{"cluster.ray": address}))


@pytest.mark.parametrize("trainers", [0, 1])
def test_ctrl_c_saves_and_ends_the_workers_and_leaves_the_cluster(cluster, tmp_path, trainers):
    with begun(cluster, tmp_path / "run", 5000, f"--train-workers={trainers}") as keel:
        try:
            until(lambda: step_of(tmp_path / "run") >= 3, 200)
            assert len(at_work(cluster, TRAINER)) == trainers
            keel.send_signal(signal.SIGINT)
            said, _ = keel.communicate(timeout=60)
        finally:
            keel.kill()
    assert keel.returncode == 130 and "Go on with: keel train --resume" in said, said
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1] == step_of(tmp_path / "run")
    until(lambda: not at_work(cluster, WORKER, TRAINER))
    until(lambda: cluster.ask("how are you") == 3)


def test_trainers_of_torchrun_share_the_workers_of_the_first(cluster, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    with begun(cluster, tmp_path / "run", 6, "--train.parallel=fsdp", before=torchrun) as trainers:
        try:
            said, _ = trainers.communicate(timeout=200)
        finally:
            trainers.kill()
    assert trainers.returncode == 0, said
    check_whole(tmp_path / "run", settings_of(cluster))
    until(lambda: not at_work(cluster))
