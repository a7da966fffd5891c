"""Rollout workers on a real Ray cluster: what is sampled does not depend on who samples it, or on who is killed meanwhile."""

from __future__ import annotations

import itertools
import os
import random
import signal
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


@pytest.mark.parametrize("changes", [{}, {"train.dynamic_sampling": True, "train.updates_per_batch": 2, "train.prompts_per_step": 2}])
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


def kill_one(cluster, rng: random.Random) -> None:
    """Any rollout worker, at any time: while it loads, samples or waits."""
    pids = actors_of(cluster)
    if pids:
        os.kill(rng.choice(pids), signal.SIGKILL)


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in range(20)])
def test_a_killed_worker_is_replaced_and_no_prompt_is_lost_or_trained_twice(cluster, number):
    rng = random.Random(number)
    settings = settings_of(cluster, steps=40, **{"train.max_staleness": rng.choice([0, 1, 2, 4])})
    killer = threading.Timer(0, lambda: None)

    def meanwhile(trainer, record):
        nonlocal killer
        if record.step == 1:
            killer = threading.Timer(rng.uniform(0, 2), kill_one, (cluster, rng))
            killer.start()

    records, _, rollouts = train(settings, meanwhile)
    killer.join()
    assert [record.step for record in records] == list(range(1, 41))
    assert ids_of(records) == expected_ids(settings, 40)
    assert all(record.metrics["train/staleness_max"] <= settings.train.max_staleness for record in records)
    assert rollouts.crew.lost <= 1
    until(lambda: not actors_of(cluster))
