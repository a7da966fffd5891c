"""Numbers that cannot be, in a step and in a run's record; the chances that alarms rest on; the verdict."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.diagnostics.health import contradictions, impossible
from keel.doctor import chance
from keel.doctor.catalogue import FAULTS, fault
from keel.doctor.finding import PARTS, Check, Finding
from keel.doctor.invariants import health
from keel.doctor.probes.controls import sign_flips
from keel.doctor.record import Record
from keel.doctor.verdict import LOOKS_AT, weigh
from keel.errors import KeelError
from keel.types import Group, Prompt, Score


@pytest.mark.parametrize(
    ("row", "metric"),
    [
        ({"policy/entropy_nats": -0.1}, "policy/entropy_nats"),
        ({"policy/clip_frac": 1.2}, "policy/clip_frac"),
        ({"gap/k3_nats": -1e-3}, "gap/k3_nats"),
        ({"kl/ref_k3_nats": -1e-3}, "kl/ref_k3_nats"),
        ({"policy/logp_mean_nats": 0.3}, "policy/logp_mean_nats"),
        ({"train/loss": math.nan}, "train/loss"),
        ({"train/grad_norm": math.inf}, "train/grad_norm"),
        ({"gap/pearson": 1.5}, "gap/pearson"),
        ({"length/mean": 9.0, "length/max": 8.0}, "length/mean"),
        ({"group/live_frac": 0.5, "group/all_right_frac": 0.5, "group/all_wrong_frac": 0.5}, "group/live_frac"),
        ({"group/size_min": 9.0, "group/size_max": 8.0}, "group/size_min"),
        ({"gap/mean_nats": -0.5, "gap/max_abs_nats": 0.1}, "gap/mean_nats"),
        ({"eval/arithmetic:easy/pass@4": 1.01}, "eval/arithmetic:easy/pass@4"),
    ],
)
def test_what_cannot_be_is_named(row, metric):
    assert [found.metric for found in impossible(row)] == [metric]


@pytest.mark.parametrize(
    "row",
    [
        {"train/loss": 0.0, "train/grad_norm": 0.4, "advantage/mean": 0.0},  # centred advantages, ratio 1
        {
            "train/loss": -0.3,
            "train/grad_norm": 0.0,
            "group/live_frac": 0.0,
            "group/all_right_frac": 1.0,
            "group/all_wrong_frac": 0.0,
        },
        {
            "policy/clip_frac": 0.0,
            "policy/off_policy_frac": 0.0,
            "policy/log_ratio_mean_nats": 0.0,
            "policy/log_ratio_max_abs": 0.0,
        },
        {"policy/entropy_nats": -1e-8, "policy/logp_mean_nats": 1e-9, "gap/k3_nats": -1e-12},  # rounding
        {"gap/mean_nats": -2e-7, "gap/max_abs_nats": 5e-6, "kl/ref_k1_nats": -0.01},
        {"train/grad_norm": math.inf, "train/skipped_steps": 1.0},  # it was skipped, and says so
        {"eval/reward_mean": math.nan},
    ],
)
def test_healthy_oddities_are_silent(row):
    assert impossible(row) == []


def group(make_completion, id="p", verdicts=((1.0, "a"), (0.0, "b"))):
    made = tuple(make_completion([5, 1], id, i, text=text) for i, (_, text) in enumerate(verdicts))
    return Group(Prompt(id, "?", "a"), made, tuple(Score(value, value == 1.0) for value, _ in verdicts))


def test_groups_that_cannot_be(make_completion):
    fine = group(make_completion)
    assert contradictions([fine, group(make_completion, "q")], 2) == []
    assert [f.metric for f in contradictions([fine], 4)] == ["group/size"]
    assert [f.metric for f in contradictions([fine, fine], 2)] == ["group/count"]
    torn = group(make_completion, verdicts=((1.0, "a"), (0.0, "a")))
    assert [f.metric for f in contradictions([torn], 2)] == ["reward/verdicts"]


def test_a_health_record_is_read():
    assert health(Record("none")).skipped
    assert health(Record("fine", health=({"step": 1, "found": []},))).holds
    bad = {"metric": "train/loss", "value": None, "why": "must be a finite number"}
    rows = tuple({"step": float(n), "train/lr": 1e-4} for n in range(1, 6))
    check = health(Record("bad", rows=rows, health=tuple({"step": n, "found": [bad] if n > 3 else []} for n in range(1, 6))))
    assert [f.fault.code for f in check.findings] == ["K174"] and "step 4" in check.says and "2 of 5 steps" in check.says


# ── chances ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0.001, 0.999), st.integers(2, 64))
def test_live_groups_are_binomial(p, size):
    assert 0.0 <= chance.live_share(p, size) <= 1.0
    assert chance.live_share(p, size) == pytest.approx(chance.live_share(1 - p, size))


def test_the_table_of_live_groups():
    for p, size, share in ((0.0063, 8, 0.049), (0.0375, 16, 0.458), (0.43, 8, 0.988)):
        assert chance.live_share(p, size) == pytest.approx(share, abs=2e-3)


def test_live_share_of_counts_is_unbiased():
    p, tries, size = 0.3, 8, 4
    mean = sum(math.comb(tries, k) * p**k * (1 - p) ** (tries - k) * chance.live_share_of(k, tries, size) for k in range(tries + 1))
    assert mean == pytest.approx(chance.live_share(p, size))
    assert 0.0 < chance.live_share_of(2, 4, 8) < 1.0  # fewer tries than the group: a guess from Beta(3, 3)


def test_the_bound_on_events_holds_where_it_is_known():
    rng = np.random.default_rng(0)
    p = chance.more_than_expected(20, 10.0)
    assert (rng.poisson(10.0, 100_000) >= 20).mean() <= p < 0.1
    assert chance.more_than_expected(9, 10.0) == 1.0 and chance.more_than_expected(1, 0.0) == 0.0


def test_a_martingale_is_about_normal():
    rng = np.random.default_rng(0)
    share = np.array([0.1, 0.5, 0.9] * 200)
    z = [chance.martingale_z(list((rng.random(600) < share) - share), list(share * (1 - share))) for _ in range(400)]
    assert abs(np.mean(z)) < 0.2 and 0.85 < np.std(z) < 1.15


def test_signs_of_vectors_with_and_without_a_direction():
    rng = np.random.default_rng(0)
    free = rng.normal(size=(12, 300))
    assert sign_flips(free @ free.T, 0) > 1e-3
    pulled = free + 1.0
    assert sign_flips(pulled @ pulled.T, 0) < 1e-3


def test_the_card_shares_its_chance_of_a_false_alarm():
    assert chance.ALPHA * chance.TESTS == pytest.approx(chance.CARD_ALPHA) and chance.CARD_ALPHA <= 1e-3


# ── catalogue and verdict ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_fault_says_what_its_alarm_rests_on():
    assert len({each.code for each in FAULTS}) == len(FAULTS)
    for each in FAULTS:
        assert each.part == PARTS[int(each.code[1]) - 1], each.code
        assert each.remedy and each.why and each.shows and each.rests_on, each.code
        assert all(source.startswith("https://") for source in each.sources)


def test_an_unknown_code_is_refused():
    with pytest.raises(KeelError, match="K999"):
        fault("K999")


def checks(*codes):
    return [Check(f"probe {i}", "…", (Finding(fault(code), "…"),)) for i, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("codes", "verdicts"),
    [
        ((), ()),
        (("K568",), ("difficulty",)),
        (("K568", "K461"), ("reward",)),
        (("K568", "K620"), ("settings",)),
        (("K568", "K101"), ("framework", "difficulty")),  # one does not explain the other
        (("K366", "K458"), ("reward",)),
        (("K212", "K151"), ("framework",)),
        (("K214", "K365"), ("engine gap", "data")),
    ],
)
def test_difficulty_is_what_is_left_over(codes, verdicts):
    assert set(weigh(checks(*codes)).verdicts) == set(verdicts)


def test_every_probe_looks_at_a_part():
    from keel.doctor.probes import PROBES

    assert set(PROBES) == set(LOOKS_AT)
