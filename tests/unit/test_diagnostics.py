"""measure: every number against a hand-made batch; metrics: every name has its unit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keel.diagnostics import check_names, measure, metrics_markdown
from keel.diagnostics.metrics import FAMILIES, METRICS, metric
from keel.errors import KeelError
from keel.objectives.corrections import MaskToken
from keel.objectives.recipes import recipe
from keel.types import Batch

OBJECTIVE = recipe("dr_grpo").objective  # group mean, clip .2


def make_batch() -> Batch:
    """Two groups: one right, one wrong and one unscorable; two wrong, one of them truncated."""
    length = torch.tensor([2, 3, 3, 1, 3])
    scorable = torch.tensor([True, True, True, True, False])
    inside = torch.arange(3) < length[:, None]
    old = torch.full((5, 3), -1.0)
    return Batch(
        tokens=torch.zeros(5, 4, dtype=torch.long),
        prompt_len=torch.ones(5, dtype=torch.long),
        completion_len=length,
        mask=inside & scorable[:, None],
        logp_rollout=old - torch.tensor([0.1, 0.0, 0.0, 0.0, 9.0])[:, None],
        group=torch.tensor([0, 0, 1, 1, 0]),
        reward=torch.tensor([1.0, 0.0, 0.0, 0.0, float("nan")]),
        scorable=scorable,
        correct=torch.tensor([True, False, False, False, True]),
        truncated=torch.tensor([False, False, True, False, False]),
        versions=torch.zeros(5, 3, dtype=torch.long),
        logp_old=old,
        logp_ref=old,
    )


def numbers(batch: Batch, logp: torch.Tensor, objective=OBJECTIVE) -> dict[str, float]:
    prepared = objective.prepare(batch, 3)
    entropy = torch.full_like(logp, 0.5)
    return measure(batch, prepared, logp, entropy, objective, objective.counts(batch, prepared, 3))


LOGP = torch.full((5, 3), -1.0)
LOGP[0, 0] = -1.0 + math.log(1.5)  # the first token of the right answer: past 1.2, so clipped


def test_numbers():
    got = numbers(make_batch(), LOGP)
    expected = {
        "reward/mean": 0.25,
        "reward/std": math.sqrt(3) / 4,
        "reward/correct_frac": 0.25,
        "reward/unscorable_frac": 0.2,
        "reward/truncated_mean": 0.0,
        "reward/finished_mean": 1 / 3,
        "reward/beyond_correct_frac": 0.0,
        "group/count": 2,
        "group/live_frac": 0.5,
        "group/all_right_frac": 0.0,
        "group/all_wrong_frac": 0.5,
        "group/zero_advantage_frac": 0.5,
        "group/size_min": 2,
        "group/size_max": 2,
        "length/mean": 12 / 5,
        "length/max": 3,
        "length/right_mean": 2,
        "length/wrong_mean": 7 / 3,
        "length/truncated_frac": 0.2,
        "advantage/mean": (2 * 0.5 - 3 * 0.5) / 9,
        "advantage/abs_max": 0.5,
        "advantage/positive_frac": 2 / 9,
        "policy/entropy_nats": 0.5,
        "policy/logp_mean_nats": -1.0 + math.log(1.5) / 9,
        "policy/clip_frac": 1 / 9,
        "policy/log_ratio_mean_nats": math.log(1.5) / 9,
        "policy/log_ratio_max_abs": math.log(1.5),
        "policy/off_policy_frac": 1 / 9,
        "policy/old_kl_nats": (1.5 - 1 - math.log(1.5)) / 9,
        "gap/mean_nats": 0.2 / 9,
        "gap/max_abs_nats": 0.1,
        "gap/k3_nats": 2 * (math.exp(0.1) - 1.1) / 9,
        "gap/weight_mean": (7 + 2 * math.exp(0.1)) / 9,
        "gap/chi2": 2 * (math.exp(0.1) - 1) ** 2 / 9,
        "gap/outside_frac": 2 / 9,
        "gap/positive_frac": 1.0,
        "gap/ess_frac": (7 + 2 * math.exp(0.1)) ** 2 / (9 * (7 + 2 * math.exp(0.2))),
        "gap/sequence_ess_frac": (3 + math.exp(0.2)) ** 2 / (4 * (3 + math.exp(0.4))),
        "gap/sequence_max_abs_nats": 0.2,
        "kl/ref_k1_nats": math.log(1.5) / 9,
        "kl/ref_k3_nats": (1 / 1.5 - 1 + math.log(1.5)) / 9,
        "kl/ref_max_abs_nats": math.log(1.5),
        "tokens/step": 9,
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert set(got) - set(expected) == {"advantage/std"}
    check_names(got)


@pytest.mark.parametrize("leaves", [False, True])
def test_what_corrections_reject_is_counted_whether_it_leaves_or_not(leaves):
    """Two of nine tokens, all of one of four completions, have a ratio of 1.105."""
    objective = replace(OBJECTIVE, corrections=(MaskToken(0.9, 1.1, leaves=leaves),))
    got = numbers(make_batch(), LOGP, objective)
    assert got["gap/rejected_frac"] == pytest.approx(2 / 9)
    assert got["gap/rejected_completions_frac"] == pytest.approx(1 / 4)
    assert got["tokens/step"] == (7 if leaves else 9)
    assert got["gap/max_abs_nats"] == pytest.approx(0.0 if leaves else 0.1)
    assert got["gap/correction_mean"] == pytest.approx(1.0 if leaves else 3 / 5)  # of the tokens with an advantage
    check_names(got)


def test_what_was_not_measured_is_absent():
    """Nobody right: no length of right answers. No reference: no KL. No separate forward pass: no word of staleness."""
    batch = replace(make_batch(), correct=torch.zeros(5, dtype=torch.bool), logp_ref=None, logp_old=None)
    got = numbers(batch, LOGP)
    absent = {"length/right_mean", "kl/ref_k3_nats", "policy/off_policy_frac", "policy/log_ratio_max_abs"}
    assert not absent & set(got)
    assert got["policy/clip_frac"] == 0.0


def test_a_fault_is_not_hidden():
    """NaN at a trained token reaches the metric; it is not mistaken for a token that is not there."""
    spoilt = LOGP.clone()
    spoilt[0, 1] = float("nan")
    got = numbers(make_batch(), spoilt)
    assert math.isnan(got["policy/logp_mean_nats"])
    assert got["policy/off_policy_frac"] == pytest.approx(2 / 9)


def test_padding_does_not_dilute():
    """F74: with fifty columns of padding more every number is the same."""
    batch = make_batch()

    def pad(x):
        return torch.nn.functional.pad(x, (0, 50))

    names = ("mask", "logp_rollout", "logp_old", "logp_ref", "versions")
    wide = replace(batch, **{name: pad(getattr(batch, name)) for name in names})
    assert numbers(wide, pad(LOGP)) == pytest.approx(numbers(batch, LOGP))


def test_every_metric_has_family_unit_and_meaning():
    assert len({m.name for m in METRICS}) == len(METRICS)
    for entry in METRICS:
        assert entry.family in FAMILIES and entry.unit and entry.meaning
    assert {m.family for m in METRICS} == set(FAMILIES)


@pytest.mark.parametrize("name", ["eval/pass@1", "eval/pass@16", "eval/medium:sub/pass@1", "time/rollout_s", "train/grad_norm"])
def test_known_names(name):
    assert metric(name).unit


@pytest.mark.parametrize("name, hint", [("reward/maen", "reward/mean"), ("eval/pass@x", "eval/pass"), ("gap", "No metric")])
def test_an_unknown_name_is_refused(name, hint):
    with pytest.raises(KeelError, match=hint):
        check_names(["reward/mean", name])


def test_metrics_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics_markdown(), "run: python docs/generate.py"
