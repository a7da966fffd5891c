"""Trainers on a cluster: what keeps them from beginning or ending is told, with what was found and what to do."""

from __future__ import annotations

import os
import re

import pytest
from clusters import TRAINER, WORKER, at_work, until
from runs import settings_of

import keel
from keel import ray_trainers
from keel.config import RunConfig
from keel.errors import KeelError
from keel.ray_cluster import versions

DEADLY = """
import os, signal, time
from dataclasses import replace
from keel.tasks.task import get_task, register

DEADLY = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "slow": lambda: time.sleep(60)}

def deadly(variant):
    return replace(get_task("arithmetic:medium"), name=f"deadly:{variant}", grade=lambda prompt, text: DEADLY[variant](), checked=0)

register("deadly", deadly)
"""


def train(cluster, tmp_path, **changes):
    short = {"evaluation.prompts": 4, "evaluation.samples": 1, "evaluation.every": 0, "evaluation.standard_panel": False}
    where = {"out": str(tmp_path / "run"), "cluster.rollout_workers": 1, "cluster.train_workers": 1}
    try:
        return keel.train(settings_of(cluster, 2, **short | where | changes), quiet=True)
    finally:
        until(lambda: not at_work(cluster, WORKER, TRAINER))


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    (tmp_path / "deadly_task.py").write_text(DEADLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda variant: {"plugins": ("deadly_task",), "task": f"deadly:{variant}"}


def test_a_trainer_that_no_process_survives_ends_the_run(cluster, tmp_path, deadly, monkeypatch):
    monkeypatch.setattr(ray_trainers, "LOSSES", 2)
    with pytest.raises(KeelError, match="Trainers were lost 2 times after step 0.*Expected them to live.*--train-workers"):
        train(cluster, tmp_path, **deadly("killed"))


def test_a_trainer_that_does_nothing_for_too_long_is_given_up(cluster, tmp_path, deadly):
    patience = {"cluster.start_s": 15.0, "cluster.silence_s": 15.0}
    with pytest.raises(KeelError, match="finished no step within 15 s.*raise cluster.silence_s.*keel train --resume"):
        train(cluster, tmp_path, **deadly("slow") | patience)


def test_what_a_trainer_refuses_is_told(cluster, tmp_path):
    with pytest.raises(KeelError, match="A trainer failed on .*nowhere.jsonl"):
        train(cluster, tmp_path, task="jsonl:nowhere.jsonl")


def test_more_processes_than_the_cluster_can_hold_are_refused(cluster, tmp_path):
    with pytest.raises(KeelError, match="2 rollout workers and 2 trainers need 4 CPU, and the Ray cluster has 3.*--train-workers"):
        train(cluster, tmp_path, **{"cluster.rollout_workers": 2, "cluster.train_workers": 2})


def test_trainers_for_whom_there_is_no_room_now_are_given_up(cluster, tmp_path):
    assert cluster.ask("hold") == 0
    try:
        with pytest.raises(KeelError, match="0 of 1 trainers began within 2 s; 0 CPUs of the Ray cluster are free"):
            train(cluster, tmp_path, **{"cluster.start_s": 2.0})
    finally:
        cluster.ask("free")
    until(lambda: cluster.ask("how are you") == 3)


def test_a_client_cannot_start_trainers():
    with pytest.raises(KeelError, match="--train-workers came with --ray ray://HOST.*Expected a machine of the cluster"):
        RunConfig(cluster={"ray": "ray://HOST:10001", "train_workers": 1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mark": "/nowhere/.seen"}, "does not see the run's folder /runs/x. Expected a folder that all machines share"),
        ({"expected": {"torch": "1.0"}}, "it has torch .*, and the process that started it has 1.0. Expected the same on both"),
    ],
)
def test_a_machine_that_cannot_take_part_says_why(tmp_path, changes, said):
    given = {"expected": versions(), "mark": str(tmp_path), "cwd": os.getcwd(), "resuming": False} | changes
    assert re.search(said, ray_trainers.train_rank({"out": "/runs/x"}, {}, **given))
