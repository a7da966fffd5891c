"""Rollouts ahead of training: the bound on staleness, exact replay of a schedule, and a worker that fails, hangs or dies."""

import os
import signal
import time

import pytest
import torch

import keel
from keel.config import RunConfig
from keel.errors import KeelError
from keel.models.load import load_policy
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training.ahead import Ahead, Layout
from keel.training.buffer import PromptStream
from keel.training.loop import Trainer, iterate

TINY = {
    "train.prompts_per_step": 4,
    "train.group_size": 4,
    "train.lr": 1e-3,
    "sampling.max_completion_tokens": 16,
    "engine.threads": 1,
}


def config(**changes) -> RunConfig:
    return RunConfig(steps=6).replaced(TINY | {"train.max_staleness": 2, "train.threads": 1} | changes).resolved()


def trainer_of(settings: RunConfig, schedule=None) -> Trainer:
    policy = load_policy(settings.model, seed=settings.seed)
    trainer = Trainer(policy, LocalEngine(policy), get_task(settings.task), settings.chosen(), settings)
    if schedule is not None:
        trainer._rollouts = Ahead(settings, policy.weights(), 0, trainer.stream, schedule)
    return trainer


def train(settings: RunConfig, schedule=None):
    """Records, final weights, and the version of each batch."""
    trainer = trainer_of(settings, schedule)
    try:
        records = list(iterate(trainer))
        return records, {n: p.detach().clone() for n, p in trainer.parameters.items()}, trainer.rollouts.window.used
    finally:
        trainer.close()


def test_tensors_share_one_buffer():
    weights = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor([7])}
    layout = Layout.of(weights)
    buffer = torch.zeros(layout.size, dtype=torch.uint8)
    for name, view in layout.views(buffer).items():
        view.copy_(weights[name])
    assert all(torch.equal(view, weights[name]) for name, view in layout.views(buffer).items())


@pytest.mark.parametrize("bound", [1, 10])
def test_staleness_stays_within_its_bound_and_a_schedule_replays_bit_for_bit(bound):
    settings = config(**{"train.max_staleness": bound})
    records, weights, used = train(settings)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    ages = [record.metrics["train/staleness_max"] for record in records]
    assert max(ages) <= bound
    assert ages == [step - version for step, version in enumerate(used)]
    again, same, replayed = train(settings, schedule=used)
    assert replayed == used
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert [r.metrics["reward/mean"] for r in again] == [r.metrics["reward/mean"] for r in records]


def test_every_token_carries_its_version_and_prompts_come_in_order():
    settings = config()
    records, _, used = train(settings)
    stream = PromptStream(get_task(settings.task).train, settings.seed)
    for record, version in zip(records, used, strict=True):
        assert [g.prompt.id for g in record.groups] == [p.id for p in stream.take(4)]
        assert all((c.versions == version).all() for g in record.groups for c in g.completions)


def test_several_updates_a_batch():
    settings = config(**{"train.updates_per_batch": 2, "train.max_staleness": 3, "train.prompts_per_step": 2})
    records, _, _ = train(settings)
    assert len(records) == 6 and max(r.metrics["train/staleness_max"] for r in records) <= 3


def test_partial_rollouts_carry_the_version_of_each_token_and_keep_the_bound():
    """Completions go on under newer weights, from what was written so far."""
    settings = config(**{
        "train.partial_rollouts": True, "train.max_staleness": 11, "train.group_size": 32, "sampling.max_completion_tokens": 48,
        "train.lr": 1e-4,
    })  # fmt: skip
    trainer, mixed = trainer_of(settings.replaced({"steps": 16})), 0  # the worker is at the first 12 while the trainer begins
    try:
        for record in iterate(trainer):
            assert record.metrics["train/staleness_max"] <= 11
            for completion in (c for group in record.groups for c in group.completions):
                assert (completion.versions.diff() >= 0).all() and int(completion.versions[-1]) <= record.step
                mixed += len(completion.versions.unique()) > 1
    finally:
        trainer.close()
    assert mixed > 0


def test_a_schedule_cannot_replay_partial_rollouts():
    with pytest.raises(KeelError, match="one version for each batch"):
        trainer_of(config(**{"train.partial_rollouts": True}), schedule=[0, 0, 0])


@pytest.mark.parametrize("changes", [{"train.max_staleness": 0}, {"engine.name": "vllm"}])
def test_partial_rollouts_need_a_local_engine_ahead(changes):
    with pytest.raises(KeelError, match="Expected a local engine that samples ahead"):
        config(**{"train.partial_rollouts": True} | changes)


def test_a_curriculum_is_not_sampled_ahead():
    with pytest.raises(KeelError, match="keeps its own place in the data"):
        config(**{"train.curriculum": "pass_rate"})


def test_a_run_with_a_curriculum_goes_on_as_if_it_had_never_stopped(tmp_path):
    settings = {**TINY, "train.curriculum": "pass_rate", "evaluation.prompts": 4, "evaluation.samples": 1, "checkpoint.every": 2}
    whole = keel.train("solid", quiet=True, out=str(tmp_path / "whole"), steps=4, **settings)
    keel.train("solid", quiet=True, out=str(tmp_path / "cut"), steps=2, **settings)
    cut = keel.resume(tmp_path / "cut", steps=4, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.weights().values(), cut.policy.weights().values(), strict=True))


def test_too_small_a_bound_is_refused():
    with pytest.raises(KeelError, match="Expected at least 3"):
        config(**{"train.updates_per_batch": 2, "train.max_staleness": 2})


def test_a_schedule_that_breaks_the_bound_is_refused():
    with pytest.raises(KeelError, match="versions stale"):
        train(config(**{"train.max_staleness": 1}), schedule=[0, 0, 0, 3, 4, 5])


def test_a_worker_that_dies_is_named_and_nothing_hangs():
    trainer = trainer_of(config(steps=50))
    steps = iterate(trainer)
    next(steps)
    os.kill(trainer.rollouts.worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(KeelError, match="died"):
        list(steps)
    assert time.monotonic() - start < 30
    trainer.close()


def test_a_worker_that_hangs_is_given_up():
    trainer = trainer_of(config(**{"steps": 50, "engine.timeout_s": 1.0}))
    steps = iterate(trainer)
    next(steps)
    os.kill(trainer.rollouts.worker.pid, signal.SIGSTOP)
    with pytest.raises(KeelError, match="no answer within 1 s"):
        list(steps)
    trainer.close()
    assert trainer._rollouts is None


def test_a_worker_that_cannot_begin_says_why():
    settings = config()
    with pytest.raises(KeelError, match="nosuch"):
        broken = settings.model_copy(update={"model": "nosuch-model"})
        policy = load_policy(settings.model)
        Ahead(broken, policy.weights(), 0, PromptStream(get_task(settings.task).train, 0))


def test_a_run_ahead_evaluates_saves_and_resumes(tmp_path):
    settings = {
        **TINY,
        "train.max_staleness": 2,
        "train.threads": 1,
        "evaluation.prompts": 8,
        "evaluation.samples": 1,
        "checkpoint.every": 2,
    }
    run = keel.train("solid", quiet=True, out=str(tmp_path / "run"), steps=4, **settings)
    assert run.summary["steps"] == 4 and run.summary["eval"]["pass@1"]["after"] is not None
    more = keel.resume(tmp_path / "run", steps=6, quiet=True)
    assert more.summary["steps"] == 6
