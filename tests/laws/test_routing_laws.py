"""Laws of routing replay through the real loop, on the bundled mixture of experts."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch

from keel import run
from keel.config import load_config
from keel.diagnostics import check_names
from keel.errors import KeelError
from keel.models.load import load_policy
from keel.rollout.engines import engine_of
from keel.tasks.task import get_task
from keel.training.loop import Trainer, iterate

SMALL = {
    "model": "tiny-moe", "task": "arithmetic:medium", "steps": 4, "train.prompts_per_step": 4, "train.group_size": 4,
    "train.updates_per_batch": 2, "train.probe_every": 1, "train.lr": 1e-3, "train.dynamic_sampling": False,
    "sampling.max_completion_tokens": 32,
}  # fmt: skip

known_task = cache(get_task)


def make_trainer(recipe="grpo", **changes):
    config = load_config(recipe, SMALL | {name.replace("__", "."): value for name, value in changes.items()}).resolved()
    policy = load_policy(config.model)
    return Trainer(policy, engine_of(config.engine, policy), known_task(config.task), config.chosen(), config)


def told(trainer, steps):
    """Metrics of the first steps, times left out, and the weights after them."""
    rows = [record.metrics for record in islice(iterate(trainer), steps)]
    numbers = [{k: v for k, v in row.items() if not k.startswith(("time/", "moe/"))} for row in rows]
    return rows, numbers, {name: p.detach().clone() for name, p in trainer.policy.parameters().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("engine", ["fp32", "bf16"])
def test_the_first_update_of_r2_is_that_without_replay_bit_for_bit(engine):
    _, plain, weights = told(make_trainer(engine__format=engine), 1)
    _, replayed, weights_r2 = told(make_trainer(engine__format=engine, train__routing_replay="R2"), 1)
    assert plain == replayed and same(weights, weights_r2)


def test_r3_with_an_equal_engine_is_no_replay_at_first_and_then_r2():
    _, plain, weights = told(make_trainer(), 1)
    _, r3, weights_r3 = told(make_trainer(train__routing_replay="R3"), 1)
    assert plain == r3 and same(weights, weights_r3)
    rows, r2, weights_r2 = told(make_trainer(train__routing_replay="R2"), 2)
    _, r3, weights_r3 = told(make_trainer(train__routing_replay="R3"), 2)
    assert rows[0]["moe/layers_differ_frac"] == 0  # in a later batch a tie may be broken otherwise by the engine's rounding
    assert r2 == r3 and same(weights_r2, weights_r3)


def test_replay_is_seen_in_the_second_update():
    rows, plain, _ = told(make_trainer(train__lr=3e-3), 2)
    assert rows[1]["moe/layers_moved_frac"] > 0  # otherwise there is nothing to see
    replayed_rows, replayed, _ = told(make_trainer(train__lr=3e-3, train__routing_replay="R2"), 2)
    assert plain[0] == replayed[0] and plain[1] != replayed[1]
    assert "moe/replayed_frac" not in rows[1] and replayed_rows[1]["moe/replayed_frac"] == 1.0


def test_r3_takes_the_routing_out_of_the_gap():
    changes = dict(engine__router_noise=0.1, train__prompts_per_step=16, train__group_size=8)
    rows, _, _ = told(make_trainer(**changes), 1)
    replayed, _, _ = told(make_trainer(**changes, train__routing_replay="R3"), 1)
    assert rows[0]["moe/layers_differ_frac"] > 0.05 and replayed[0]["moe/layers_differ_frac"] > 0.05
    assert replayed[0]["gap/k3_nats"] < 0.5 * rows[0]["gap/k3_nats"]
    for row in (*rows, *replayed):
        check_names(row)


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_the_cut_into_micro_batches_changes_nothing(replay):
    changes = dict(engine__router_noise=0.5, train__routing_replay=replay, train__eps=1.0, train__lr=0.1)  # near plain descent
    _, whole, weights = told(make_trainer(**changes, train__micro_batch_tokens=None), 2)
    _, cut, cut_weights = told(make_trainer(**changes, train__micro_batch_tokens=64), 2)
    assert all(whole[0][k] == pytest.approx(cut[0][k], rel=1e-3, abs=1e-5) for k in ("train/grad_norm", "train/loss"))
    for name, tensor in weights.items():
        assert torch.allclose(tensor, cut_weights[name], atol=1e-6), name


def test_the_trainer_agrees_with_an_equal_engine_and_says_how_even_the_load_is():
    row = told(make_trainer(), 1)[0][0]
    assert row["moe/layers_differ_frac"] == row["moe/tokens_differ_frac"] == 0.0
    assert row["moe/load_max"] >= 1.0 and 0.0 <= row["moe/idle_frac"] < 1.0


def test_a_dense_model_is_refused_before_anything_is_sampled():
    with pytest.raises(KeelError, match="is dense: it has no experts"):
        make_trainer(model="tiny-dense", train__routing_replay="R3")


class Forgetful:
    """An engine that does not say where its tokens went, or not of all of them."""

    def __init__(self, engine, keep):
        self.engine, self.keep = engine, keep

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, *asked):
        completions = self.engine.generate(*asked)
        for c in completions:
            object.__setattr__(c, "experts", self.keep(c.experts))  # past the types, which would stop a wrong length
        return completions


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda experts: None, "did not say which experts"),
        (lambda experts: experts[:-1], "entries in experts"),
        (lambda experts: torch.full_like(experts, -1), "has no experts for token 0"),
        (lambda experts: torch.where(experts < 0, experts, experts + 50), "it serves another model"),
    ],
)
def test_an_engine_that_tells_too_little_is_named_in_its_first_batch(keep, said):
    trainer = make_trainer(train__routing_replay="R3")
    trainer.engine = Forgetful(trainer.engine, keep)
    with pytest.raises(KeelError, match=said):
        next(iterate(trainer))


def test_a_run_replays_from_the_command_line_settings(tmp_path):
    small = {"steps": 2, "evaluation.prompts": 4, "evaluation.samples": 1, "evaluation.every": 0, "out": str(tmp_path / "run")}
    made = run.train(load_config("grpo", SMALL | small | {"train.routing_replay": "R3", "engine.format": "bf16"}), quiet=True)
    assert made.folder.rows()[-1]["moe/replayed_frac"] == 1.0
    assert made.folder.config.train.routing_replay == "R3"
