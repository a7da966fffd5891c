"""Rollout workers on a real Ray cluster: what is sampled does not depend on who samples it, or on who is killed meanwhile."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from clusters import actors_of, until

from keel.config import RunConfig
from keel.errors import KeelError
from keel.files import read_jsonl
from keel.models.load import load_policy
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training import ray_rollouts
from keel.training.buffer import PromptStream
from keel.training.loop import Trainer, iterate

SMALL = {
    "train.prompts_per_step": 4,
    "train.group_size": 4,
    "train.lr": 1e-3,
    "train.threads": 1,
    "sampling.max_completion_tokens": 16,
    "engine.threads": 1,
    "engine.timeout_s": 120.0,
    "cluster.rollout_workers": 2,
}


def settings_of(cluster, steps: int = 6, **changes) -> RunConfig:
    return RunConfig(steps=steps).replaced(SMALL | {"cluster.ray": cluster.address} | changes).resolved()


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


def expected_ids(settings: RunConfig, batches: int, size: int = 4) -> list[str]:
    return [prompt.id for prompt in PromptStream(get_task(settings.task).train, settings.seed).take(batches * size)]


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
    until(lambda: not actors_of(cluster))


class Killer(threading.Thread):
    """Kills one rollout worker, whichever, whatever it is doing: from its first instant on until `latest` seconds later."""

    def __init__(self, cluster, rng: random.Random, latest: float):
        super().__init__()
        self.cluster, self.rng, self.latest, self.killed = cluster, rng, latest, 0
        self.start()

    def run(self) -> None:
        until(lambda: actors_of(self.cluster))
        time.sleep(self.rng.uniform(0, self.latest))
        if pids := actors_of(self.cluster):
            self.killed = self.rng.choice(pids)
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in range(20)])
def test_a_killed_worker_is_replaced_and_no_prompt_is_lost_or_trained_twice(cluster, number):
    rng = random.Random(number)
    settings = settings_of(cluster, steps=60, **{"train.max_staleness": rng.choice([0, 1, 2, 4])})
    killer = Killer(cluster, rng, latest=30)  # seconds: workers load for most of them
    records, _, rollouts = train(settings, lambda trainer, record: time.sleep(0.1))
    killer.join()
    assert [record.step for record in records] == list(range(1, 61))
    assert ids_of(records) == expected_ids(settings, 60)
    assert all(record.metrics["train/staleness_max"] <= settings.train.max_staleness for record in records)
    assert rollouts.crew.lost <= (killer.killed > 0)
    print(f"staleness {settings.train.max_staleness}, killed {killer.killed}, replaced {rollouts.crew.lost}")
    until(lambda: not actors_of(cluster))


GRADER = """
import os, signal
from dataclasses import replace
from keel.tasks.task import get_task, register

def fatal(variant):
    def grade(prompt, text):
        if variant == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("no room for the answer")
    return replace(get_task("arithmetic:medium"), name=f"fatal:{variant}", grade=grade, checked=0)

register("fatal", fatal)
"""


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("killed", "Two rollout workers died one after the other on the same 4 prompts"),
        ("memory", "(?s)failed on .*MemoryError: no room"),
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
    until(lambda: not actors_of(cluster))


def test_another_torch_on_a_worker_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_rollouts, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(KeelError, match="it has torch .*, and the trainer has 1.0. Expected the same"):
        train(settings_of(cluster))


def test_more_workers_than_the_cluster_can_hold_are_refused(cluster):
    with pytest.raises(KeelError, match="3 rollout workers need 3 CPU, and the Ray cluster has 2"):
        train(settings_of(cluster, **{"cluster.rollout_workers": 3}))


def test_workers_for_whom_there_is_no_room_now_are_given_up(cluster):
    assert cluster.ask("hold") == 0
    try:
        with pytest.raises(KeelError, match="0 of 2 rollout workers began within 2 s; 0 CPUs of the Ray cluster are free"):
            train(settings_of(cluster, **{"cluster.start_s": 2.0}))
    finally:
        cluster.ask("free")
    until(lambda: cluster.ask("how are you") == 2)


@pytest.mark.parametrize(("address", "said"), [("127.0.0.1:1", "Nothing listens"), ("local", "keel starts no Ray cluster")])
def test_an_address_without_a_cluster_is_told(cluster, address, said):
    with pytest.raises(KeelError, match=f"{said}.*ray start --head"):
        train(settings_of(cluster, **{"cluster.ray": address}))


def begun(cluster, out: Path, steps: int = 60, before: tuple[str, ...] = (), **changes) -> subprocess.Popen:
    """`keel train --ray` as a user has it."""
    flags = [f"--{name}={value}" for name, value in (SMALL | changes).items() if not name.startswith("cluster")]
    short = {"--evaluation.prompts": 4, "--evaluation.samples": 1, "--evaluation.every": 0, "--evaluation.standard_panel": "false"}
    flags += [f"{name}={value}" for name, value in short.items()]
    flags += ["--train.max_staleness=2", "--checkpoint.every=5", f"--steps={steps}", f"--out={out}"]
    keel = [sys.executable, *before, "-m", "keel", "train", "solid"]
    command = [*keel, "--ray", cluster.address, "--rollout-workers", "2", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resumed(out: Path) -> str:
    command = [sys.executable, "-m", "keel", "train", "--resume", str(out), "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def steps_of(out: Path) -> int:
    return sum(1 for _ in read_jsonl(out / "metrics.jsonl")) - 1 if (out / "metrics.jsonl").exists() else 0


def trained_ids(out: Path) -> list[str]:
    """Prompts of a finished run, in the order in which they were trained on."""
    rows = read_jsonl(out / "rollouts.jsonl")
    return [prompt for prompt, _ in itertools.groupby((row["step"], row["prompt_id"]) for row in rows)]


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_a_killed_trainer_takes_its_workers_along_and_goes_on_from_its_checkpoint(cluster, tmp_path, number):
    rng = random.Random(number)
    least = rng.randint(1, 40)
    with begun(cluster, tmp_path / "run") as trainer:
        try:
            until(lambda: steps_of(tmp_path / "run") >= least, 300)
            time.sleep(rng.uniform(0, 0.2))
        finally:
            trainer.kill()
    until(lambda: not actors_of(cluster))
    assert steps_of(tmp_path / "run") < 60
    resumed(tmp_path / "run")
    settings = settings_of(cluster)
    found = trained_ids(tmp_path / "run")
    assert steps_of(tmp_path / "run") == 60
    assert [prompt for _, prompt in found] == expected_ids(settings, 60) and [step for step, _ in found] == [
        step for step in range(1, 61) for _ in range(4)
    ]
    rows = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))[1:]
    assert all(row["train/staleness_max"] <= 2 for row in rows)


def test_ctrl_c_saves_and_ends_the_workers_and_leaves_the_cluster(cluster, tmp_path):
    with begun(cluster, tmp_path / "run", steps=5000) as trainer:
        try:
            until(lambda: steps_of(tmp_path / "run") >= 3, 300)
            trainer.send_signal(signal.SIGINT)
            said, _ = trainer.communicate(timeout=60)
        finally:
            trainer.kill()
    assert trainer.returncode == 130 and "Go on with: keel train --resume" in said
    until(lambda: not actors_of(cluster))
    assert cluster.ask("how are you") == 2


def test_several_trainers_share_the_workers_of_the_first(cluster, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    with begun(cluster, tmp_path / "run", 6, torchrun, **{"train.parallel": "fsdp"}) as trainers:
        try:
            said, _ = trainers.communicate(timeout=200)
        finally:
            trainers.kill()
    assert trainers.returncode == 0, said
    assert [prompt for _, prompt in trained_ids(tmp_path / "run")] == expected_ids(settings_of(cluster), 6)
    rows = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))[1:]
    assert len(rows) == 6 and all(row["train/staleness_max"] <= 2 and row["time/sample_s"] > 0 for row in rows)
    until(lambda: not actors_of(cluster))
