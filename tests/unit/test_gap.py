"""The engine gap in numbers: by hand, by enumeration, and on faults that are known because they were made."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch

from keel.cli import main
from keel.gap.command import find
from keel.gap.measure import clustered_mean, explained_frac, measure, t95
from keel.gap.remedies import remedies
from keel.gap.temperature import fit_temperature
from keel.gap.words import at_floor, explained, told
from keel.tasks.task import get_task

SMALL = {"train.threads": 1, "sampling.max_completion_tokens": 16}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def world(rows=400, width=10, vocab=12, seed=0):
    """Logits [B, T, V] of an engine, tokens that it drew, and which are there: a sampler whose every probability is known."""
    g = generator(seed)
    logits = 2.0 * torch.randn(rows, width, vocab, generator=g, dtype=torch.float64)
    token = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=g).view(rows, width)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
    return logits, token, mask


def logp(logits, token, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(-1, token[..., None])[..., 0]


# ── numbers by hand ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_by_hand():
    # two completions: ratios 2, 1/2 and 1; the fourth place is no token
    gap = torch.tensor([[math.log(2), -math.log(2)], [0.0, math.nan]])
    rollout = torch.tensor([[math.log(0.2), math.log(0.4)], [math.log(0.5), math.inf]])
    got = measure(rollout + gap, rollout, torch.tensor([[True, True], [True, False]]))
    assert (got.tokens, got.completions) == (3, 2)
    assert got.k1_nats == pytest.approx(0.0, abs=1e-7)
    assert got.k3_nats == pytest.approx(((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 3, rel=1e-5)  # = .5/3
    assert got.chi2 == pytest.approx((1 + 0.25) / 3, rel=1e-5)
    assert got.max_abs_nats == pytest.approx(math.log(2), rel=1e-5)
    assert (got.outside_frac, got.above_frac) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert got.weight.mean == pytest.approx(3.5 / 3, rel=1e-5)
    assert got.ess_frac == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-5)
    assert got.sequence_ess_frac == pytest.approx(1.0, rel=1e-5)  # 2 · ½ and 1
    assert got.positive.mean == 0.5  # of the two that are not 0
    # probabilities .4, .2, .5 against .2, .4, .5: deviations (.0333, −.1667, .1333), (−.1667, .0333, .1333)
    assert got.pearson == pytest.approx((-0.0333 * 0.1667 * 2 + 0.1333**2) / (0.0333**2 + 0.1667**2 + 0.1333**2), abs=1e-3)


def test_masked_is_absent():
    logits, token, mask = world(40)
    mu = logp(logits, token)
    old = mu + 0.01 * torch.randn(mu.shape, generator=generator(1), dtype=mu.dtype)
    junk = torch.tensor([math.nan, math.inf, -math.inf, 99.0]).double()[torch.randint(4, mu.shape, generator=generator(2))]
    entropy = torch.rand(mu.shape, generator=generator(3), dtype=mu.dtype)
    plain = measure(old, mu, mask, entropy)
    dirty = measure(torch.where(mask, old, junk), torch.where(mask, mu, junk), mask, torch.where(mask, entropy, junk))
    assert plain == dirty
    gaps = [torch.where(mask, old - mu, other) for other in (torch.zeros(()).double(), junk)]
    assert remedies(gaps[0], mask) == remedies(gaps[1], mask)


def test_rows_permute():
    logits, token, mask = world(60)
    mu = logp(logits, token)
    old = logp(logits, token, 1.1)
    order = torch.randperm(60, generator=generator())
    a, b = measure(old, mu, mask), measure(old[order], mu[order], mask[order])
    assert a.k3_nats == pytest.approx(b.k3_nats, rel=1e-9)
    assert a.gap.low == pytest.approx(b.gap.low, rel=1e-9)
    assert a.bins["position"][2].k3_nats == pytest.approx(b.bins["position"][2].k3_nats, rel=1e-9)


def test_bins_cut_everything_once():
    logits, token, mask = world()
    mu, old = logp(logits, token), logp(logits, token, 1.3)
    entropy = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
    bins = measure(old, mu, mask, entropy).bins
    for kind in ("probability", "entropy"):
        assert sum(each.share for each in bins[kind]) == pytest.approx(1.0)
        assert sum(each.k3_share for each in bins[kind]) == pytest.approx(1.0)
    assert [each.where for each in bins["position"]] == ["1", "2", "3–4", "5–8", "9–16", "last"]
    assert sum(each.share for each in bins["position"][:-1]) == pytest.approx(1.0)
    assert bins["position"][-1].share == pytest.approx(len(mask) / int(mask.sum()))


# ── expectations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_estimators_of_the_divergence_are_unbiased():
    logits, token, mask = world(4000)
    other = logits + 0.2 * torch.randn(logits.shape, generator=generator(5), dtype=logits.dtype)
    truth = (logits.softmax(-1) * (logits.log_softmax(-1) - other.log_softmax(-1))).sum(-1)[mask].mean()
    got = measure(logp(other, token), logp(logits, token), mask)
    assert got.k3_nats == pytest.approx(float(truth), rel=0.1)
    assert not got.gap.excludes(-float(truth))
    assert not got.weight.excludes(1.0)  # both spread over all tokens


def test_the_mean_weight_is_the_kept_mass():
    logits, _, mask = world(2000)
    kept = logits >= logits.topk(4, -1).values[..., -1:]
    mass = (logits.softmax(-1) * kept).sum(-1)
    cut = logits.masked_fill(~kept, -math.inf)
    token = torch.multinomial(cut.softmax(-1).flatten(0, 1), 1, generator=generator(7)).view(mask.shape)
    got = measure(logp(logits, token), logp(cut, token), mask)
    assert got.weight.mean == pytest.approx(float(mass[mask].mean()), rel=1e-6)
    assert got.weight.excludes(1.0) and got.positive.mean == 0


def test_intervals_hold_what_they_promise_when_rows_hang_together():
    held = 0
    for seed in range(200):
        g = generator(seed)
        cluster = torch.arange(48) // 4
        value = torch.randn(12, 1, generator=g)[cluster] + torch.randn(48, 5, generator=g)
        held += not clustered_mean(value, torch.ones(48, 5, dtype=torch.bool), cluster).excludes(0.0)
    assert 180 <= held <= 199  # 190 expected; were tokens taken for independent, about 110


def test_one_cluster_has_no_interval():
    got = clustered_mean(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.long))
    assert (got.mean, got.low, got.high) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_points_of_students_t(freedom, value):
    assert t95(freedom) == pytest.approx(value, rel=0.01)


def test_noise_is_not_explained_by_the_probability_and_a_temperature_is():
    logits, token, mask = world()
    mu = logp(logits, token)[mask]
    noise = 0.1 * torch.randn(mu.shape, generator=generator(1), dtype=mu.dtype)
    assert explained_frac(noise, mu.exp()) < 0.02
    few = [explained_frac(torch.randn(60, generator=generator(s)), torch.rand(60, generator=generator(99 + s))) for s in range(50)]
    assert sum(few) / 50 < 0.04  # what chance gives six classes of ten is taken off; it would be .085
    assert explained_frac(logp(logits, token, 1.2)[mask] - mu, mu.exp()) > 0.3


# ── best-fit temperature ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("factor", [0.5, 0.7, 0.95, 1.0, 1.4, 2.0])
def test_the_temperature_of_an_engine_that_draws_otherwise(factor):
    logits, _, mask = world()
    token = torch.multinomial((logits / factor).softmax(-1).flatten(0, 1), 1, generator=generator(9)).view(mask.shape)
    fit = fit_temperature(lambda f: logp(logits, token, f), logp(logits, token, factor), mask)
    assert fit.squared == pytest.approx(factor, rel=0.005)
    assert fit.likelihood_low <= factor <= fit.likelihood_high
    assert fit.misreported == (factor != 1.0)
    assert fit.misdrawn is (True if abs(factor - 1) > 0.1 else None)  # 5 % are too little for so few tokens


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_raw_log_probabilities_are_told_from_another_temperature(temperature):
    logits, _, mask = world()
    token = torch.multinomial((logits / temperature).softmax(-1).flatten(0, 1), 1, generator=generator(9)).view(mask.shape)
    fit = fit_temperature(lambda f: logp(logits, token, f * temperature), logp(logits, token), mask)
    assert fit.squared == pytest.approx(1 / temperature, rel=0.005)
    assert fit.likelihood == pytest.approx(1.0, rel=0.05)
    assert fit.misreported and fit.misdrawn is False


def test_noise_is_no_temperature_fault():
    logits, token, mask = world()
    noisy = logits + 0.1 * torch.randn(logits.shape, generator=generator(2), dtype=logits.dtype)
    fit = fit_temperature(lambda f: logp(noisy, token, f), logp(logits, token), mask)
    assert not fit.misreported


# ── remedies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_corrections_do_by_hand():
    # three completions: ratios (1, 4), (1, .1), (1, 1e-5)
    gap = torch.tensor([[1.0, 4.0], [1.0, 0.1], [1.0, 1e-5]]).log()
    got = {r.name: r for r in remedies(gap, torch.ones(3, 2, dtype=torch.bool))}
    assert (got["truncate_token"].kept_frac, got["truncate_token"].capped_frac) == (1.0, pytest.approx(1 / 6))
    assert got["truncate_token"].weight_mean == pytest.approx((1 + 2 + 1 + 0.1 + 1 + 1e-5) / 6, rel=1e-4)
    assert got["mask_token"].kept_frac == pytest.approx(4 / 6)  # [.5, 5] throws away .1 and 1e-5
    assert got["mask_token"].kept_completions_frac == 1.0
    assert got["truncate_sequence"].capped_frac == pytest.approx(2 / 6)
    assert got["mask_sequence"].kept_completions_frac == pytest.approx(2 / 3)
    assert got["reject_geometric"].kept_frac == 0.0
    assert got["veto"].kept_completions_frac == pytest.approx(2 / 3)
    assert got["off_policy_mask"].kept_completions_frac == pytest.approx(1 / 3)


def test_without_a_gap_nothing_is_touched():
    for r in remedies(torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)):
        assert (r.kept_frac, r.kept_completions_frac, r.capped_frac, r.weight_mean) == (1.0, 1.0, 0.0, 1.0), r


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", autouse=True)
def tasks_once():
    """Thousands of gold answers are checked when a task is made: once is enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keel.parts.get_task", cache(get_task))
        yield


@pytest.fixture(scope="module")
def found():
    """found(**settings): what `keel gap tiny-dense` finds, once for each."""
    known = {}

    def once(**changes):
        key = tuple(changes.items())
        if key not in known:
            known[key] = find("tiny-dense", SMALL | {k.replace("__", "."): v for k, v in changes.items()}, samples=48, group_size=4)
        return known[key]

    return once


def test_an_exact_engine_is_at_the_floor(found):
    exact = found()
    assert at_floor(exact)
    assert exact.gap.max_abs_nats <= 1e-4
    assert 0 < exact.floor.max_abs_nats < 1e-4
    assert "Nothing has to be corrected" in explained(exact)[-1]


def test_rounding_is_called_noise(found):
    rounded = found(engine__format="bf16")
    said = " ".join(explained(rounded))
    assert not at_floor(rounded)
    assert "Temperature: no fault" in said and "Noise:" in said and "Mass:" not in said


def test_a_hidden_temperature_is_called_one(found):
    said = " ".join(explained(found(engine__hidden_temperature=0.6)))
    assert "Temperature fault: at × 0.60" in said and "Mend that first" in said
    assert "draws at another temperature" in said or "too few to say" in said


def test_a_hidden_cut_is_called_one(found):
    said = " ".join(explained(found(engine__hidden_top_p=0.8)))
    assert "Mass: the mean ratio" in said and "cuts off" in said and "Mend that first" in said


def test_replayed_truncation_is_at_the_floor(found):
    assert at_floor(found(sampling__top_p=0.8, sampling__temperature=1.2))


def test_few_bits_flatten(found):
    said = " ".join(explained(found(engine__weight_bits=3)))
    assert "Bias:" in said and "flatter than" in said and "throw away more than 10 %: reject_geometric" in said


def test_a_wreck_is_neither_a_temperature_nor_a_cut(found):
    said = " ".join(explained(found(engine__weight_bits=2)))
    assert "Temperature: no fault" in said and "Mass:" not in said and "Wreck:" in said


def test_a_dense_model_has_no_routing(found):
    assert found().routing is None


@pytest.mark.parametrize(("noise", "says"), [(0.0, "send every token to the same experts"), (0.2, "R3) is worth its memory")])
def test_routing_is_told_apart_from_the_rest(noise, says):
    made = find("tiny-moe", SMALL | {"engine.router_noise": noise, "engine.head_format": "bf16"}, samples=256, group_size=4)
    routing = made.routing  # the head's rounding alone moves no token to another expert
    assert routing.tokens_differ_frac >= routing.layers_differ_frac and routing.load_max >= 1.0
    assert routing.replayed_k3_nats <= made.gap.k3_nats * 1.0001 and says in " ".join(explained(made))
    if noise:
        assert routing.replayed_k3_nats < 0.7 * made.gap.k3_nats and routing.k3_share > 0.1 and routing.tokens_differ_frac > 0.05
        assert "experts that differ" in told(made)


def test_the_table(found):
    out = told(found(engine__format="bf16"))
    assert "engine local, format bf16" in out and "Noise floor:" in out and "truncate_token" in out


def test_the_command_prints_json(capsys):
    arguments = ["gap", "tiny-moe", "--engine", "local", "--engine.router_noise", "0.5", "--samples", "16", "--group-size", "2"]
    arguments += ["--sampling.max_completion_tokens", "12", "--train.threads", "1"]
    assert main([*arguments, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["engine"]["numerics"]["router_noise"] == 0.5
    assert numbers["gap"]["k3_nats"] > numbers["floor"]["k3_nats"]
    assert {"squared", "likelihood"} <= numbers["fit"].keys()


def test_mistakes_are_told_in_a_paragraph(capsys):
    assert main(["gap", "tiny-dense", "--samples", "8", "--group-size", "8"]) == 2
    assert "at least two groups" in capsys.readouterr().err
    assert main(["gap", "tiny-dense", "--engine.format", "fp4"]) == 2
    assert "engine.format" in capsys.readouterr().err
    assert main(["gap", "tiny-dense", "--engine.router_noise", "1"]) == 2
    assert "has no router" in capsys.readouterr().err
