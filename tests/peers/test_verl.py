"""Under verl's own functions, called as its trainer and its actor call them, is a registered recipe's loss keel's?"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch

from keel.audit.conformance import MAX_TOKENS, random_batch
from keel.audit.peers import installed, loss_and_gradient
from keel.errors import KeelError
from keel.integrations.verl import IDLE_BOUND, beyond, name_of, reads_gap, register, settings
from keel.objectives.kl import k3_clamped
from keel.objectives.parts import vary
from keel.objectives.recipes import RECIPES, recipe

ACTOR = "actor_rollout_ref.actor."


def importable() -> bool:
    """verl's source is enough for an audit; here it must be importable, with what its losses need."""
    return all(map(installed, ("verl", "tensordict", "ray", "omegaconf", "hydra", "codetiming", "orjson", "torchdata")))


pytestmark = [
    pytest.mark.skipif(not importable(), reason="verl cannot be imported here: make test-peers installs it"),
    pytest.mark.filterwarnings("ignore"),  # verl's own, and those of what it imports
]
HELD = [name for name, one in RECIPES.items() if not beyond(one.objective)]
BATCHES = 100


def batches(name):
    """Random stale batches; k3 in the loss stays where verl does not clamp it."""
    for seed in range(BATCHES):
        batch, logp = random_batch(seed, gap=reads_gap(recipe(name).objective))
        loss_kl = recipe(name).objective.loss_kl
        if loss_kl is not None:
            batch = replace(batch, logp_ref=logp + (batch.logp_ref - logp).clamp(-2.0, 2.0))
        yield batch, logp


def config_of(name):
    """verl's own ActorConfig with the knobs of the recipe."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    knobs = settings(recipe(name), MAX_TOKENS)
    own = {key.removeprefix(ACTOR): value for key, value in knobs.items() if key.startswith(ACTOR)}
    mode = own.pop("policy_loss.loss_mode")
    policy_loss = PolicyLossConfig(loss_mode=mode)
    return ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=policy_loss, **own)


def advantages(name, batch):
    """What verl's trainer puts into a batch before the actor sees it: rewards with KL, advantages, correction weights."""
    from verl import DataProto
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    knobs, mask = settings(recipe(name), MAX_TOKENS), batch.mask
    scores = torch.zeros_like(batch.logp_old)
    scores[torch.arange(len(batch)), batch.completion_len - 1] = batch.reward
    columns = dict(
        response_mask=mask.double(), token_level_scores=scores, token_level_rewards=scores, old_log_probs=batch.logp_old,
        ref_log_prob=batch.logp_ref,
    )  # fmt: skip
    data = DataProto.from_dict(columns, non_tensors={"uid": [f"prompt {g}" for g in batch.group.tolist()]})
    on = knobs["algorithm.use_kl_in_reward"]
    if on:
        control = core_algos.FixedKLController(knobs["algorithm.kl_ctrl.kl_coef"])
        data, _ = ray_trainer.apply_kl_penalty(data, control, knobs["algorithm.kl_penalty"])
    config = AlgoConfig(adv_estimator=name_of(recipe(name)), use_kl_in_reward=on)
    data = ray_trainer.compute_advantage(data, config.adv_estimator, config=config)
    weights = None
    if reads_gap(recipe(name).objective):
        gap = batch.logp_old - batch.logp_rollout
        weights, _ = compute_rollout_correction_weights(gap, mask.double(), "token", str(IDLE_BOUND))
    return data.batch["advantages"], weights


def verls(name, batch, logp, cuts, ranks):
    """Loss and gradient by verl's ppo_loss over micro-batches of the ranks, whose gradients are averaged."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    advantage, weights = advantages(name, batch)
    logp = logp.detach().requires_grad_()
    total = torch.zeros(())
    for rows in torch.arange(len(batch)).tensor_split(cuts):
        mask = batch.mask[rows].long()
        seen = torch.cat([torch.ones(len(rows), 1, dtype=torch.long), mask], 1)
        columns = dict(
            prompts=torch.ones(len(rows), 1, dtype=torch.long), responses=torch.ones_like(mask), attention_mask=seen,
            response_mask=mask, old_log_probs=batch.logp_old[rows], advantages=advantage[rows], ref_log_prob=batch.logp_ref[rows],
        )  # fmt: skip
        if weights is not None:
            columns["rollout_is_weights"] = weights[rows]
        data = TensorDict(columns, batch_size=len(rows))
        tu.assign_non_tensor(data, dp_size=ranks, batch_num_tokens=int(batch.mask.sum()), global_batch_size=len(batch))
        after = [torch.cat([logp[row][: batch.completion_len[row]], logp.new_zeros(1)]) for row in rows.tolist()]
        loss, _ = ppo_loss(config_of(name), {"log_probs": torch.cat(after)}, data)
        total = total + loss / ranks
    return total.detach(), torch.autograd.grad(total, logp)[0]


@pytest.fixture(autouse=True)
def registered():
    for name in HELD:
        register(recipe(name))


@pytest.mark.parametrize("name", HELD)
def test_loss_and_gradient_are_keels_on_random_batches_however_cut_and_on_however_many_ranks(name):
    for seed, (batch, logp) in enumerate(batches(name)):
        (loss, slope), (own, own_slope) = (
            verls(name, batch, logp, cuts=1 + seed % 4, ranks=1 + seed % 2),
            loss_and_gradient(recipe(name).objective, logp, batch, MAX_TOKENS),
        )
        assert float((slope - own_slope).norm()) <= 1e-7 * float(own_slope.norm()) and float(own_slope.norm()) > 0
        assert abs(float(loss - own)) <= 1e-7 * max(abs(float(own)), float(own_slope.norm()))


def test_where_k3_is_large_verls_clamp_is_all_that_differs():
    batch, logp = random_batch(0, gap=False)
    theirs = verls("grpo", batch, logp, 1, 1)[1]
    clamped = vary(recipe("grpo").objective, {"loss_kl.estimator": k3_clamped})
    own, plain = (loss_and_gradient(one, logp, batch, MAX_TOKENS)[1] for one in (clamped, recipe("grpo").objective))
    torch.testing.assert_close(theirs, own, rtol=1e-6, atol=1e-9)
    assert float((own - plain).norm()) > 0.01 * float(own.norm())


def test_all_recipes_but_one_can_be_held_and_that_one_says_why():
    assert set(RECIPES) - set(HELD) == {"deepseek_v32"}
    with pytest.raises(KeelError, match="the KL in its loss has a ratio"):
        register(recipe("deepseek_v32"))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("grpo", {"use_kl_loss": False}, "use_kl_loss is False"),
        ("dapo", {"use_kl_loss": True}, "use_kl_loss is True"),
        ("dapo", {"loss_agg_mode": "seq-mean-token-mean"}, "loss_agg_mode is seq-mean-token-mean"),
        ("solid", {"loss_scale_factor": None}, "Expected loss_scale_factor: data.max_response_length"),
    ],
)
def test_a_configuration_that_makes_another_objective_is_refused(name, changes, says, monkeypatch):
    made = replace(config_of(name), **changes)
    monkeypatch.setattr(sys.modules[__name__], "config_of", lambda _: made)
    batch, logp = random_batch(0, gap=False)
    with pytest.raises(KeelError, match=says):
        verls(name, batch, logp, 1, 1)


def test_a_correction_without_weights_is_refused(monkeypatch):
    batch, logp = random_batch(0)
    given = advantages("tis", batch)[0]
    monkeypatch.setattr(sys.modules[__name__], "advantages", lambda *_: (given, None))
    with pytest.raises(KeelError, match="rollout_is: token"):
        verls("tis", batch, logp, 1, 1)


@pytest.mark.parametrize("adapter", [False, True])
def test_every_knob_that_keel_writes_is_one_of_verls(adapter):
    import yaml

    from keel.audit.peers.configuration import _flat
    from keel.audit.peers.source import folder
    from keel.config import load_config
    from keel.integrations.export import write

    own = yaml.safe_load((folder("verl") / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    known = {name for name, _ in _flat(own)}
    for name in HELD:
        written = yaml.safe_load(write("verl", load_config(name, {}), adapter).text)
        unknown = {knob for knob, _ in _flat(written)} - known
        assert all(knob.startswith(("reward.reward_kwargs.", "algorithm.filter_groups.")) for knob in unknown), unknown


def quiet():
    return {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}


def names_in_verl(**environment):
    asked = "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; print(*r)"
    run = [sys.executable, "-W", "ignore", "-c", asked]
    environment = {**quiet(), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(run, capture_output=True, text=True, timeout=600, check=True, env=environment).stdout.split()


def test_verl_finds_the_recipes_by_its_variable():
    names = names_in_verl(VERL_USE_EXTERNAL_MODULES="keel.integrations.verl_plugin")
    assert {f"keel_{name}" for name in HELD} <= set(names)
    assert "keel_dapo" not in names_in_verl()


@pytest.mark.skipif(not any(e.name == "keel" for e in entry_points(group="verl.plugins")), reason="keel is not installed here")
def test_verl_finds_the_recipes_by_keels_entry_point():
    assert "keel_dapo" in names_in_verl(VERL_USE_EXTERNAL_PLUGINS="auto")
