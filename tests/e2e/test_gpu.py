"""On a graphics card, where there is one: the same run as on a CPU, up to the arithmetic of the card."""

from __future__ import annotations

import pytest
import torch

from keel.config import load_config
from keel.parts import assemble
from keel.training.loop import Trainer, iterate

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
