"""Is the loss that TRL descends under the adapter keel's own, to the last digits, however TRL cuts the batch?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from keel.audit.peers import installed
from keel.errors import KeelError
from keel.models.load import load_policy
from keel.objectives.corrections import MaskSequence
from keel.objectives.objective import Objective
from keel.objectives.recipes import RECIPES, recipe
from keel.objectives.shaping import OverlongFilter
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training.batch import batch_from_groups
from keel.training.buffer import PromptStream
from keel.training.step import accumulate_gradient, log_probabilities
from keel.types import Group, Sampling, Score

pytestmark = [
    pytest.mark.skipif(not installed("trl"), reason="trl is not installed: pip install 'keel-rl[peers]', or make test-peers"),
    pytest.mark.filterwarnings("ignore"),  # TRL's own, and those of what it imports
]
CAP, PROMPTS, GROUP = 12, 4, 4
PLAIN = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)


def shaken(policy, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return policy


def sampler():
    """What has sampled, in float64; the reference is what it was shaken from."""
    policy = load_policy("tiny-dense")
    policy.model.double()
    return shaken(policy, 0)


@cache
def stored():
    """A rollout batch: rewards of several values, completions cut off, one that cannot be scored, and an engine gap."""
    policy, task = sampler(), get_task("arithmetic:medium")
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in PromptStream(task.train, 0).take(PROMPTS)]
    draw = torch.Generator().manual_seed(1)
    groups = []
    for number, prompt in enumerate(prompts):
        sampled = LocalEngine(policy).generate([prompt], Sampling(max_completion_tokens=CAP), Seed(0, 0), GROUP)
        noise = (0.2 * torch.randn(len(c.token_ids), generator=draw) for c in sampled)
        sampled = tuple(replace(c, logp_rollout=c.logp_rollout.float() + n) for c, n in zip(sampled, noise, strict=True))
        values = (torch.randint(0, 4, (GROUP,), generator=draw) / 4).tolist()
        groups.append(Group(prompt, sampled, tuple(Score(None if number == i == 1 else v) for i, v in enumerate(values))))
    assert any(c.finish == "length" for g in groups for c in g.completions)
    return groups


def trainer_of(policy, objective, folder, **settings):
    """A trainer whose generation hands out what is stored."""
    from datasets import Dataset

    from keel.integrations.trl import GRPOConfig, KeelGRPOTrainer

    class Given(KeelGRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *_):
            waiting = {g.prompt.token_ids: list(g.completions) for g in stored()}
            taken = [waiting[tuple(ids)].pop(0) for ids in prompt_ids]
            return [c.token_ids.tolist() for c in taken], [c.logp_rollout.tolist() for c in taken]

    def reward(prompts, place, **_):
        seen = defaultdict(int)
        for at in place:
            seen[at] += 1
            yield stored()[at].scores[seen[at] - 1].value

    decode = policy.tokenizer.decode
    texts = [decode(g.prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for g in stored()]
    policy.model.generation_config.eos_token_id = sorted(policy.end_ids)
    shape = dict(num_generations=GROUP, max_completion_length=CAP, shuffle_dataset=False, optim="sgd", lr_scheduler_type="constant")
    return Given(
        policy.model,
        lambda *given, **named: list(reward(*given, **named)),
        GRPOConfig(output_dir=str(folder), **PLAIN, **shape, **settings),
        Dataset.from_dict({"prompt": texts, "place": list(range(PROMPTS))}),
        objective=objective,
        processing_class=policy.tokenizer,
    )


def descend(trainer, steps):
    """Run so many of TRL's training steps, micro-batches that is."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = next(iter(trainer.get_train_dataloader()))
    for _ in range(steps):
        trainer.training_step(trainer.model_wrapped, rows, None)


def slopes(policy):
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters().values()])


def keels(policy, objective, rows=None, old=None):
    """The gradient of keel's own step on the stored batch, or on some rows of it."""
    batch = batch_from_groups(stored())
    everything = [torch.arange(len(batch))]
    batch = replace(batch, logp_rollout=batch.logp_rollout.double(), reward=batch.reward.double())
    if "logp_ref" in objective.needs:
        reference = load_policy("tiny-dense")
        reference.model.double()
        batch = replace(batch, logp_ref=log_probabilities(reference, batch, everything, 1.0))
    if old or "logp_old" in objective.needs:
        batch = replace(batch, logp_old=log_probabilities(old or policy, batch, everything, 1.0))
    prepared = objective.prepare(batch, CAP)
    if rows is not None:
        batch, prepared = batch.rows(rows), prepared.rows(rows)
    policy.model.zero_grad()
    counts = objective.counts(batch, prepared, CAP)
    accumulate_gradient(policy, objective, batch, prepared, counts, torch.arange(len(batch)).split(5), 1.0)
    return slopes(policy)


def assert_same(theirs, own):
    assert float(own.norm()) > 1e-6
    assert float((theirs - own).norm()) <= 1e-5 * float(own.norm())


OBJECTIVES = {
    **{name: one.objective for name, one in RECIPES.items()},
    "leaving": Objective(corrections=(MaskSequence(low=0.5, leaves=True),), shaping=(OverlongFilter(),), entropy_coef=0.1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_a_stored_batch_trl_descends_keels_gradient_however_it_is_cut(name, tmp_path):
    policy = sampler()
    trainer = trainer_of(policy, OBJECTIVES[name], tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    descend(trainer, 4)
    theirs = slopes(policy)
    assert_same(theirs, keels(policy, OBJECTIVES[name]))


@pytest.mark.parametrize("name", ["dapo", "gspo", "grpo", "deepseek_v32", "cispo", "reinforce_pp"])
def test_a_stale_update_has_the_ratios_and_denominators_of_its_own_rows(name, tmp_path):
    policy, objective = sampler(), recipe(name).objective
    shape = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4)
    trainer = trainer_of(policy, name, tmp_path, **shape)
    descend(trainer, 2)
    policy.model.zero_grad()
    shaken(policy, 2)
    descend(trainer, 2)
    theirs = slopes(policy)
    rows = torch.tensor(list(places(trainer._buffered_inputs[2:])))
    assert len(set(rows.tolist())) == 8
    assert_same(theirs, keels(policy, objective, rows, old=sampler()))


def places(inputs):
    """Which rows of the stored batch these are."""
    known = defaultdict(list)
    for number, (group, completion) in enumerate((g, c) for g in stored() for c in g.completions):
        known[group.prompt.token_ids, tuple(completion.logp_rollout.tolist())].append(number)
    for part in inputs:
        for ids, mask, logp, length in zip(
            part["prompt_ids"], part["prompt_mask"], part["batch.logp_rollout"], part["batch.completion_len"], strict=True
        ):
            yield known[tuple(ids[mask.bool()].tolist()), tuple(logp[:length].float().tolist())].pop()


def test_what_trl_reports_is_the_entropy_and_where_the_clip_binds(tmp_path):
    trainer = trainer_of(sampler(), "dapo", tmp_path, per_device_train_batch_size=16)
    descend(trainer, 1)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]
    (entropy,) = trainer._metrics["train"]["entropy"]
    assert 0.05 < entropy < 3.0


def test_evaluation_takes_the_same_loss_over_its_own_rows(tmp_path):
    policy = sampler()
    trainer = trainer_of(policy, "solid", tmp_path, per_device_train_batch_size=16)
    policy.model.eval()
    rows = next(iter(trainer.get_train_dataloader()))
    loss = trainer.prediction_step(policy.model, rows, True)[0]
    batch = replace(batch_from_groups(stored()), logp_old=None)
    objective = recipe("solid").objective
    prepared = objective.prepare(batch, CAP)
    seen = policy.logp(batch)
    own = objective.loss(seen.logp, seen.entropy, batch, prepared, objective.counts(batch, prepared, CAP))
    assert float(loss) == pytest.approx(float(own), rel=1e-5)


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights_after_a_step(folder, name, ranks):
    """Weights after one optimizer step by TRL's own loop, on so many ranks of this machine."""
    script = f"import test_trl; test_trl.train_once({str(folder)!r}, {name!r}, {ranks})"
    here = str(Path(__file__).parent)
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    own = [shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}) for rank in range(ranks)]
    workers = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env=env, cwd=here) for env in own]
    try:
        assert [worker.wait(timeout=600) for worker in workers] == [0] * ranks
    finally:
        for worker in workers:
            worker.kill()
    return torch.load(Path(folder) / f"{name}-{ranks}.pt")


def free_port():
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def train_once(folder, name, ranks):
    """What a rank runs."""
    policy = sampler()
    shape = dict(per_device_train_batch_size=8 // ranks, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.1)
    trainer = trainer_of(policy, name, folder, **shape)
    trainer.train()
    assert trainer.accelerator.num_processes == ranks
    if trainer.accelerator.is_main_process:
        torch.save(torch.cat([p.detach().flatten() for p in policy.parameters().values()]), Path(folder) / f"{name}-{ranks}.pt")


@pytest.mark.parametrize("name", ["reinforce_pp_baseline"])
def test_two_ranks_make_the_step_that_one_makes(name, tmp_path):
    one, two = (weights_after_a_step(tmp_path, name, ranks) for ranks in (1, 2))
    before = torch.cat([p.detach().flatten() for p in sampler().parameters().values()])
    assert_same(two - before, one - before)


# ── configurations ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RECIPES)
def test_what_keel_writes_is_a_grpo_config_of_trls(name, tmp_path):
    import yaml
    from trl import GRPOConfig

    from keel.config import load_config
    from keel.integrations.export import write
    from keel.integrations.trl import _with_loss_off

    own, adapter = (yaml.safe_load(write("trl", load_config(name, {}), adapter=on).text) for on in (False, True))
    made = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **own)
    assert made.generation_batch_size == 256 * recipe(name).updates_per_batch
    loop = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **adapter)
    assert _with_loss_off(loop, recipe(name).objective).loss_type == GRPOConfig(output_dir=str(tmp_path), bf16=False).loss_type


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_knob_of_trls_own_loss_is_refused_since_it_would_do_nothing(tmp_path):
    with pytest.raises(KeelError, match="beta, loss_type are knobs of TRL's own loss"):
        trainer_of(sampler(), "grpo", tmp_path, per_device_train_batch_size=16, beta=0.04, loss_type="grpo")


def test_an_optimizer_step_over_two_rollout_batches_is_refused(tmp_path):
    shape = dict(per_device_train_batch_size=4, gradient_accumulation_steps=8, steps_per_generation=4)
    with pytest.raises(KeelError, match="rows of two rollout batches"):
        trainer_of(sampler(), "grpo", tmp_path, **shape)


def test_another_trl_is_refused_with_the_version_to_install(tmp_path, monkeypatch):
    import trl

    monkeypatch.setattr(trl, "__version__", "1.17.2")
    with pytest.raises(KeelError, match="TRL 1.17.2 is installed. Expected 1.16"):
        trainer_of(sampler(), "grpo", tmp_path, per_device_train_batch_size=16)
