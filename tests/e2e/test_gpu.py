"""On a graphics card, where there is one: the same run as on a CPU, up to the arithmetic of the card."""

from __future__ import annotations

import pytest
import torch

from keel.config import load_config
from keel.models.load import load_policy
from keel.parts import assemble
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training.batch import batch_from_groups
from keel.training.loop import Trainer, iterate
from keel.types import Group, Sampling, Score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SMALL = {"steps": 3, "train.prompts_per_step": 4, "train.group_size": 4, "train.probe_every": 1, "evaluation.prompts": 8}


def told(device: str, **changes):
    parts = assemble(load_config("grpo", SMALL | {"train.device": device} | changes).resolved())
    return [r.metrics for r in iterate(Trainer(parts.policy, parts.engine, parts.task, parts.recipe, parts.config))]


@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_a_run_on_the_card_is_on_policy_and_near_the_cpu(model):
    here, there = told("cpu", model=model), told("cuda", model=model)
    assert all(row["policy/off_policy_frac"] == 0 and row["gap/max_abs_nats"] < 1e-3 for row in there)
    assert here[0]["train/grad_norm"] == pytest.approx(there[0]["train/grad_norm"], rel=1e-2)


def test_products_in_bf16_and_recomputed_activations_train():
    rows = told("cuda", **{"train.dtype": "bf16", "train.checkpoint_activations": True})
    assert all(0 < row["train/grad_norm"] < 100 and row["train/skipped_steps"] == 0 for row in rows)


@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_captured_steps_sample_what_plain_ones_do(model):
    """Up to the card's sums over other shapes: a token that lies on a boundary may fall to the other side, and what follows it."""
    policy, task, sampling = load_policy(model, device="cuda"), get_task("arithmetic:easy"), Sampling(max_completion_tokens=40)
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in task.train[:8]]
    captured, plain = LocalEngine(policy), LocalEngine(policy, eager=True)
    assert captured.captures and not plain.captures
    for step in range(3):  # graphs are made anew for each batch
        found, expected = (engine.generate(prompts, sampling, Seed(0, step), 8) for engine in (captured, plain))
        same = [torch.equal(one.token_ids, other.token_ids) for one, other in zip(found, expected, strict=True)]
        assert sum(same) >= 0.95 * len(same)
        for one, other in [pair for pair, alike in zip(zip(found, expected, strict=True), same, strict=True) if alike]:
            torch.testing.assert_close(one.logp_rollout, other.logp_rollout, rtol=0, atol=1e-4)


def test_weights_that_come_between_tokens_reach_captured_steps():
    policy, task = load_policy("tiny-dense", device="cuda"), get_task("arithmetic:easy")
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in task.train[:4]]
    engine, asked = LocalEngine(policy), iter(range(1000))
    engine.renew = lambda: next(asked) == 5 and engine.take(policy.weights(), 1) != ""
    made = engine.generate(prompts, Sampling(max_completion_tokens=30), Seed(0, 0), 8)
    found = policy.logp(batch_of(prompts, made)).logp
    assert any(1 in each.versions for each in made)
    for row, each in enumerate(made):
        torch.testing.assert_close(found[row, : len(each.token_ids)], each.logp_rollout, rtol=0, atol=1e-3)


def batch_of(prompts, made):
    rows = [tuple(made[8 * n : 8 * n + 8]) for n in range(len(prompts))]
    scores = (Score(0.0, False),) * 8
    return batch_from_groups([Group(prompt, each, scores) for prompt, each in zip(prompts, rows, strict=True)])
