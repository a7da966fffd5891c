"""Laws of an engine that differs on purpose: corrections through the real loop, what leaves denominators, bypass and decoupled."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from keel.config import load_config
from keel.diagnostics import check_names
from keel.held_out import held_out
from keel.models.load import load_policy
from keel.objectives.parts import PARTS, vary
from keel.parts import Parts
from keel.rollout.engine import Seed, check_completions
from keel.rollout.engines import engine_of
from keel.rollout.local import LocalEngine
from keel.tasks.task import get_task
from keel.training.batch import batch_from_groups
from keel.training.loop import Trainer, _with_log_probabilities, iterate

SMALL = {
    "model": "tiny-dense", "task": "arithmetic:medium", "steps": 2, "train.prompts_per_step": 6, "train.group_size": 4,
    "train.probe_every": 1, "train.dynamic_sampling": False, "sampling.max_completion_tokens": 32, "train.lr": 1e-3,
    "engine.weight_bits": 3,
}  # fmt: skip
# bounds at which both verdicts occur with three bits
BOUNDS = {
    "truncate_token": {"cap": 1.05},
    "mask_token": {"low": 0.8, "high": 1.2},
    "truncate_sequence": {"cap": 1.1},
    "mask_sequence": {"low": 0.8, "high": 1.2},
    "reject_geometric": {"low": 0.99, "high": 1.01},
    "veto": {"low": 0.7},
    "off_policy_mask": {"delta": 0.005},
}
LEAVING = ["mask_token", "mask_sequence", "reject_geometric", "veto"]


known_task = cache(get_task)  # checking thousands of gold answers once is enough


def make_trainer(recipe="solid", **changes):
    config = load_config(recipe, SMALL | {name.replace("__", "."): value for name, value in changes.items()}).resolved()
    policy = load_policy(config.model)
    return Trainer(policy, engine_of(config.engine, policy), known_task(config.task), config.chosen(), config)


def corrected(name, **changes):
    """A trainer with that correction, at the bounds above."""
    bounds = {f"objective.corrections.{name}.{key}": value for key, value in (BOUNDS[name] | changes).items()}
    return make_trainer(**{"objective.corrections": name}, **bounds)


@pytest.fixture(scope="module")
def sampled():
    """One batch of the three-bit engine as the loop prepares it, with what the engine said and what the trainer says."""
    trainer = make_trainer()
    return trainer, _with_log_probabilities(trainer, batch_from_groups(trainer.rollouts.collect(0).groups))


def by_hand(name, gap, advantage):
    """The weights [tokens] of one completion, in plain arithmetic. `gap`: a list of its log-ratios."""
    bound = BOUNDS[name]
    ratios = [math.exp(g) for g in gap]
    product, mean = math.exp(sum(gap)), math.exp(sum(gap) / len(gap))
    inside = lambda x: bound["low"] <= x <= bound["high"]  # noqa: E731
    return {
        "truncate_token": lambda: [min(w, bound["cap"]) for w in ratios],
        "mask_token": lambda: [w if inside(w) else 0.0 for w in ratios],
        "truncate_sequence": lambda: [min(product, bound["cap"])] * len(gap),
        "mask_sequence": lambda: [product if inside(product) else 0.0] * len(gap),
        "reject_geometric": lambda: [1.0 if inside(mean) else 0.0] * len(gap),
        "veto": lambda: [0.0 if min(ratios) < bound["low"] else 1.0] * len(gap),
        "off_policy_mask": lambda: [0.0 if advantage < 0 and -sum(gap) / len(gap) > bound["delta"] else 1.0] * len(gap),
    }[name]()


def slopes(objective, batch, cap=32):
    """d loss / d logp of every token, where the trainer stands at the sampling weights."""
    prepared = objective.prepare(batch, cap)
    logp = batch.logp_old.clone().requires_grad_()
    objective.loss(logp, torch.zeros_like(logp), batch, prepared, objective.counts(batch, prepared, cap)).backward()
    return logp.grad, prepared


def objective_with(trainer, name, **changes):
    settings = {f"corrections.{name}.{key}": value for key, value in (BOUNDS[name] | changes).items()}
    return vary(trainer.objective, {"corrections": [name], **settings})


# ── corrections ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_correction_is_named_here():
    assert set(BOUNDS) == set(PARTS["corrections"])


@pytest.mark.parametrize("name", BOUNDS)
def test_a_correction_weighs_the_gradient_of_each_token_as_written_by_hand(sampled, name):
    trainer, batch = sampled
    plain, prepared = slopes(trainer.objective, batch)
    weighed, _ = slopes(objective_with(trainer, name), batch)
    seen = set()
    for row in range(len(batch)):
        n = int(batch.completion_len[row])
        gap = (batch.logp_old - batch.logp_rollout)[row, :n].tolist()
        weights = by_hand(name, gap, float(prepared.advantage[row, 0]))
        assert torch.allclose(weighed[row, :n], plain[row, :n] * torch.tensor(weights), rtol=1e-4, atol=1e-9)
        seen |= {weight == 0.0 for weight in weights} if "truncate" not in name else {w == BOUNDS[name]["cap"] for w in weights}
    assert seen == {True, False}, "the bounds bind nowhere or everywhere: nothing was compared"


@pytest.mark.parametrize("name", BOUNDS)
def test_a_correction_runs_through_the_loop(name):
    trainer = corrected(name)
    before = {key: p.detach().clone() for key, p in trainer.parameters.items()}
    told = [record.metrics for record in iterate(trainer)]
    for metrics in told:
        check_names(metrics)
        assert math.isfinite(metrics["train/loss"]) and metrics["train/grad_norm"] > 0
        assert metrics["gap/k3_nats"] > 1e-4  # it saw the gap that it corrects
        assert 0 <= metrics["gap/rejected_frac"] < 1
    if "truncate" in name:
        assert all(metrics["gap/rejected_frac"] == 0 for metrics in told)
    else:
        assert told[0]["gap/rejected_frac"] > 0
    assert all(not torch.equal(p, before[key]) for key, p in trainer.parameters.items())


def test_corrections_compose(sampled):
    trainer, batch = sampled
    both = vary(trainer.objective, {"corrections": ["veto", "truncate_token"]})
    alone = [slopes(vary(trainer.objective, {"corrections": [name]}), batch)[0] for name in ("veto", "truncate_token")]
    plain = slopes(trainer.objective, batch)[0]
    product = torch.where(plain != 0, alone[0] * alone[1] / plain, 0.0)
    assert torch.allclose(slopes(both, batch)[0], product, rtol=1e-5)


# ── leaving the denominators ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("aggregate", ["token_mean", "constant_length_mean", "sequence_mean"])
def test_leaving_changes_denominators_and_nothing_else(sampled, name, aggregate):
    trainer, batch = sampled
    stays, leaves = (vary(objective_with(trainer, name, leaves=leaving), {"aggregate": aggregate}) for leaving in (False, True))
    (kept, prepared), (left, thinned) = slopes(stays, batch), slopes(leaves, batch)
    assert torch.equal((kept != 0), (left != 0))  # the same tokens carry a gradient
    assert torch.equal(prepared.advantage[thinned.mask], thinned.advantage[thinned.mask])  # the baseline is the whole group's
    before, after = (o.counts(batch, p, 32) for o, p in ((stays, prepared), (leaves, thinned)))
    assert 0 < int(after.tokens) < int(before.tokens)
    if aggregate == "token_mean":
        factor = torch.full_like(kept, int(before.tokens) / int(after.tokens))
    elif aggregate == "constant_length_mean":
        factor = torch.full_like(kept, int(before.completions) / int(after.completions))
    else:  # each completion's own length counts too
        share = prepared.mask.sum(1) / thinned.mask.sum(1).clamp(min=1)
        factor = share[:, None].expand_as(kept) * int(before.completions) / int(after.completions)
    assert torch.allclose(left, kept * factor, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", LEAVING)
def test_leaving_through_the_loop_scales_the_gradient(name):
    (kept, *_), (left, *_) = (
        [r.metrics for r in iterate(make_trainer(**settings, steps=1))]
        for leaving in (False, True)
        for settings in [
            {"objective.corrections": name, "objective.aggregate": "token_mean", f"objective.corrections.{name}.leaves": leaving}
            | {f"objective.corrections.{name}.{key}": value for key, value in BOUNDS[name].items()}
        ]
    )
    assert left["tokens/step"] < kept["tokens/step"]
    assert kept["gap/rejected_frac"] == pytest.approx(left["gap/rejected_frac"])
    assert left["gap/rejected_frac"] == pytest.approx(1 - left["tokens/step"] / kept["tokens/step"])
    factor = kept["tokens/step"] / left["tokens/step"]
    assert left["train/grad_norm"] == pytest.approx(kept["train/grad_norm"] * factor, rel=1e-4)


# ── bypass and decoupled ──────────────────────────────────────────────────────────────────────────────────────────────


def first(recipe="solid", **changes):
    return next(iterate(make_trainer(recipe, **changes))).metrics


def test_bypass_calls_the_gap_staleness():
    plain, bypassed = first(), first(train__bypass_old=True)
    assert bypassed["gap/max_abs_nats"] == 0 and bypassed["gap/weight_mean"] == 1
    assert bypassed["policy/log_ratio_mean_nats"] == pytest.approx(plain["gap/mean_nats"], abs=1e-6)
    assert bypassed["policy/log_ratio_max_abs"] == pytest.approx(plain["gap/max_abs_nats"], abs=1e-5)
    assert plain["policy/off_policy_frac"] == 0


def test_unclipped_bypass_and_decoupled_are_the_same_step():
    unclipped = {"objective__surrogate": "unclipped"}
    bypassed = first(train__bypass_old=True, **unclipped)
    decoupled = first(**unclipped, **{"objective.corrections": "truncate_token", "objective.corrections.truncate_token.cap": 1e30})
    neither = first(**unclipped)
    assert bypassed["train/grad_norm"] == pytest.approx(decoupled["train/grad_norm"], rel=1e-4)
    assert bypassed["train/grad_norm"] != pytest.approx(neither["train/grad_norm"], rel=1e-3)


def test_a_clip_binds_on_the_gap_when_bypassed_and_only_on_staleness_when_decoupled():
    clip = {"objective__surrogate": "clip", "train__updates_per_batch": 1}
    assert first(train__bypass_old=True, **clip)["policy/clip_frac"] > 0
    assert first(**clip, **{"objective.corrections": "truncate_token"})["policy/clip_frac"] == 0


# ── formats, syncs and evaluation through the loop ────────────────────────────────────────────────────────────────────

ENGINES = {
    "bf16": {"engine.format": "bf16"},
    "fp16": {"engine.format": "fp16"},
    "fp8": {"engine.format": "fp8"},
    "int8": {"engine.format": "int8"},
    "head": {"engine.head_format": "bf16"},
    "order": {"engine.format": "bf16", "engine.order": "separate"},
    "router": {"model": "tiny-moe", "engine.router_noise": 0.3},
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_inexact_engine_keeps_the_contract_and_shows_its_gap(name):
    metrics = first(**({"engine.weight_bits": None, "steps": 1} | ENGINES[name]))
    check_names(metrics)
    assert 1e-3 < metrics["gap/max_abs_nats"] < 3
    assert 0 < metrics["gap/chi2"] and metrics["gap/ess_frac"] <= 1 and metrics["gap/pearson"] > 0.9


def test_an_engine_out_of_step_says_whose_tokens_they_are():
    told = [
        ({int(v) for g in r.groups for c in g.completions for v in c.versions}, r.metrics)
        for r in iterate(make_trainer(steps=5, **{"engine.weight_bits": None, "engine.sync_every": 2}))
    ]
    assert [versions for versions, _ in told] == [{0}, {0}, {2}, {2}, {4}]
    gaps = [metrics["gap/max_abs_nats"] for _, metrics in told]
    assert max(gaps[0::2]) <= 1e-4 < 1e-2 < min(gaps[1::2])  # logp_old is the trainer's at the newest weights
    assert [metrics["train/staleness_max"] for _, metrics in told] == [0, 1, 0, 1, 0]


def test_an_engine_out_of_step_resumes_bit_for_bit():
    changes = {"engine.weight_bits": None, "engine.sync_every": 3, "steps": 5}
    whole = make_trainer(**changes)
    list(iterate(whole))
    begun = make_trainer(**(changes | {"steps": 2}))
    list(iterate(begun))
    tensors, clocks = begun.state()
    resumed = make_trainer(**changes)
    resumed.restore({name: tensor.clone() for name, tensor in tensors.items()}, dict(clocks))
    list(iterate(resumed))
    assert all(torch.equal(p, resumed.parameters[name]) for name, p in whole.parameters.items())
    assert whole.engine.version == resumed.engine.version == 3


def parts_of(**changes):
    small = {"evaluation.prompts": 24, "evaluation.samples": 2, "engine.weight_bits": None}
    trainer = make_trainer(**(small | changes))
    return Parts(trainer.config, trainer.policy, trainer.engine, trainer.task, trainer.recipe)


def test_trainer_and_sampler_are_evaluated_apart():
    exact, coarse = parts_of(), parts_of(**{"engine.weight_bits": 2})
    plain, told = held_out(exact), held_out(coarse)
    check_names(told)
    assert not [name for name in plain if name.startswith("eval/sampler/")]
    of_the_trainer = {name: value for name, value in told.items() if name.startswith("eval/") and "/sampler/" not in name}
    assert of_the_trainer == {name: value for name, value in plain.items() if name.startswith("eval/")}
    assert told["eval/sampler/pass@1"] < told["eval/pass@1"] - 0.2  # two bits break it


def test_an_exact_engine_evaluates_itself(monkeypatch):
    parts = parts_of()
    monkeypatch.setattr("keel.held_out._exact_engine", lambda policy: pytest.fail("a second engine was made for nothing"))
    held_out(parts)


def test_a_contract_check_sees_the_version_that_sampled():
    trainer = make_trainer(**{"engine.weight_bits": None, "engine.sync_every": 2})
    engine, sampling = trainer.engine, replace(trainer.sampling, max_completion_tokens=4)
    asked = [trainer.policy.template.render(p, trainer.policy.tokenizer) for p in trainer.task.train[:2]]
    engine.load(trainer.policy.weights(), 1)
    made = engine.generate(asked, sampling, Seed(0, 1), 2)
    rules = dict(end_ids=trainer.policy.end_ids, vocab_size=64)
    check_completions(asked, made, 2, sampling, version=engine.version, **rules)
    with pytest.raises(ValueError, match="weights of version 0 at token 0; expected version 1"):
        check_completions(asked, made, 2, sampling, version=1, **rules)
    assert isinstance(engine, LocalEngine) and not engine.exact
