"""Predictions and their verdicts: what can be asked, what is answered, and in which words."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from keel.errors import KeelError
from keel.lab.compute import fitted, misses, sigmoid
from keel.lab.measures import Point, mean_over_tokens, series, value_at
from keel.lab.predictions import Prediction
from keel.lab.results import Outcome, Results, compact, pairs_of, results, table, unlike_tokens
from keel.lab.runner import jobs_of
from keel.lab.study import Study
from keel.lab.verdicts import OPEN, Pairs, calls, decide, judge

SPREAD = np.linspace(-1, 1, 10) * 0.02  # mean 0, standard deviation .0135


def expected(expect="higher", margin=0.0, **changes):
    return Prediction(**({"says": "it is", "arm": "b", "against": "a", "expect": expect, "margin": margin} | changes))


def verdict(expect, margin, shift, n=10, **changes):
    noise = np.linspace(-1, 1, n) * 0.02
    told = Pairs(expected(expect, margin, **changes), tuple(range(n)), tuple((0.5 + shift + noise).tolist()), (0.5,) * n)
    return judge([told])[0]


@pytest.mark.parametrize(
    ("expect", "margin", "shift", "word"),
    [
        ("higher", 0.0, 0.03, "supported"),
        ("higher", 0.0, -0.03, "refuted"),
        ("higher", 0.0, 0.005, OPEN),
        ("higher", 0.02, 0.05, "supported"),
        ("higher", 0.02, 0.025, OPEN),  # above the margin, but not surely
        ("higher", 0.02, 0.005, "refuted"),  # higher perhaps, but not by what matters
        ("lower", 0.0, -0.03, "supported"),
        ("lower", 0.0, 0.03, "refuted"),
        ("lower", 0.02, -0.005, "refuted"),
        ("equal", 0.02, 0.0, "supported"),
        ("equal", 0.02, 0.015, OPEN),
        ("equal", 0.02, 0.04, "refuted"),
        ("equal", 0.02, -0.04, "refuted"),
        ("equal", 0.005, 0.0, OPEN),  # the interval is wider than the margin
    ],
)
def test_the_rule(expect, margin, shift, word):
    assert verdict(expect, margin, shift).verdict == word


def test_the_rule_is_the_interval():
    """supported: the interval lies in the set; refuted: outside; for draws of every kind."""
    rng = np.random.default_rng(0)
    for expect in ("higher", "lower", "equal"):
        drawn = rng.normal(rng.normal(0, 0.5, (300, 1)), 0.5, (300, 10))
        supported, refuted = calls(drawn, expect, 0.3)
        assert supported.any() and refuted.any() and not (supported & refuted).any()
        for row, yes, no in zip(drawn, supported, refuted, strict=True):
            told = judge([Pairs(expected(expect, 0.3), tuple(range(10)), tuple(row.tolist()), (0.0,) * 10)])[0] if yes else None
            lean, p = decide(row, expect, 0.3)
            assert (lean == "supported" and p < 0.05) == yes and (lean == "refuted" and p < 0.05) == no
            if told is not None:
                assert {"higher": told.low > 0.3, "lower": told.high < -0.3, "equal": max(-told.low90, told.high90) < 0.3}[expect]


def test_few_seeds_hint():
    for shift, word in ((0.1, "points to it"), (-0.1, "points against it"), (0.0, OPEN)):
        told = verdict("higher", 0.0, shift, n=5)
        assert told.verdict == word and ("A hint only: 5 seeds, and a verdict takes 10" in told.words) == (word != OPEN)


@pytest.mark.parametrize(("changes", "why"), [
    ({"missing": ("b, seed 3 failed: boom",)}, "pairs are missing"),
    ({"reservations": ("a quick size",)}, "a quick size"),
])  # fmt: skip
def test_what_else_makes_a_hint(changes, why):
    told = judge([Pairs(expected(), tuple(range(10)), tuple((0.6 + SPREAD).tolist()), (0.5,) * 10, **changes)])[0]
    assert told.verdict == "points to it" and why in told.words and why in told.hint


def test_holm_takes_the_others_into_account():
    """One p of .03 alone is enough; next to four that say nothing it is not."""
    shift = 0.0111
    alone = verdict("higher", 0.0, shift)
    assert 0.02 < alone.p < 0.04 and alone.p_holm == alone.p and alone.verdict == "supported"
    same = Pairs(expected(), tuple(range(10)), tuple((0.5 + shift + SPREAD).tolist()), (0.5,) * 10)
    nothing = Pairs(expected(), tuple(range(10)), tuple((0.5 + SPREAD).tolist()), (0.5,) * 10)
    together = judge([same, nothing, nothing, nothing, nothing])[0]
    assert together.p == alone.p and together.p_holm == pytest.approx(5 * alone.p) and together.verdict == OPEN
    assert together.detectable > alone.detectable


def test_what_more_seeds_would_tell_is_said():
    told = verdict("higher", 0.0, 0.005)
    assert told.seeds_needed > 10 and f"about {told.seeds_needed} would tell" in told.words
    assert f"{told.seeds_needed - 10} more" in told.words
    assert verdict("higher", 0.0, 0.0).seeds_needed is None and "no number of seeds" in verdict("higher", 0.0, 0.0).words


def test_runs_that_do_the_same_are_equal_and_no_more():
    same = Pairs(expected("equal", 1e-9), tuple(range(10)), (0.5,) * 10, (0.5,) * 10)
    assert judge([same])[0].verdict == "supported" and judge([same])[0].p == 0.0
    assert judge([Pairs(expected(), same.seeds, same.arm, same.reference)])[0].verdict == OPEN
    few = Pairs(expected(), (0, 1, 2, 3, 4), (0.75,) * 5, (0.5,) * 5)  # coarse values: five times the same step
    assert judge([few])[0].p == pytest.approx(0.0625) and judge([few])[0].verdict == OPEN


def test_one_pair_tells_nothing():
    told = judge([Pairs(expected(), (0,), (0.9,), (0.1,))])[0]
    assert told.verdict == OPEN and told.low == -math.inf and told.detectable == math.inf
    none = judge([Pairs(expected(), (0,), (math.nan,), (0.1,), ("b, seed 0 has not ended",))])[0]
    assert none.verdict == OPEN and "There is no pair to judge by: b, seed 0 has not ended." == none.words


def test_a_factor_of_two_is_one_in_log2():
    told = Pairs(expected("lower", 1.0, scale="log2"), (0, 1, 2), (1.0, 2.0, 4.0), (4.0, 8.0, 17.0))
    assert told.differences[:2].tolist() == [-2.0, -2.0] and judge([told])[0].verdict == "points to it"


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expect": "equal"}, "expects equality and has no margin"),
        ({"expect": "heigher"}, "expect is 'heigher'"),
        ({"metrik": "x"}, "Prediction 'it is': There is no setting 'metrik' in the study's file. Did you mean 'metric'"),
        ({"against_value": 0.5}, "has both against and against_value"),
        ({"at": "equal-tokens", "against": "start"}, "equal tokens"),
        ({"at": "fall", "against": "start"}, "compares 'fall' with the start"),
        ({"at": "best-on-validation"}, "luck in part"),
    ],
)
def test_predictions_that_cannot_be_judged_are_refused(changes, said):
    with pytest.raises(KeelError, match=said):
        expected(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "c"}, "names an arm 'c'. Expected .*one of: 'a', 'b'"),
        ({"arm": "a"}, "compares 'a' with itself"),
        ({"metric": "lenght/mean"}, "did you mean 'length/mean'"),
        ({"metric": "eval/skills:sort/pass@1"}, "evaluation.panel, which has: arithmetic:easy"),
        ({"metric": "eval/pass@8"}, "a k in evaluation.ks, which is .1."),
    ],
)
def test_predictions_must_fit_their_study(changes, said):
    base = {"evaluation": {"panel": ["arithmetic:easy"]}}
    prediction = {"says": "it is", "arm": "b", "expect": "higher"} | changes
    study = Study(name="s", question="?", base=base, arms={"a": {}, "b": {"train": {"lr": 1e-3}}}, predictions=[prediction])
    with pytest.raises(KeelError, match=said):
        study.resolved_arms()


def test_a_panel_task_may_be_named_as_the_study_names_it():
    told = expected(metric="eval/arithmetic:medium?skip_test=512&test_size=1024/pass@1", at="best-on-validation")
    assert told.logged == "eval/arithmetic:medium-skip_test-512-test_size-1024/pass@1"


RANKED = {"arm": "* · big", "against": "* · small", "scale": "ranks"}
WAYS = ("x", "y", "z", "w")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "x · big"}, "one \\* in both arms"),
        ({"against": ""}, "one \\* in both arms"),
        ({"scale": "difference"}, "one \\* in both arms"),
    ],
)
def test_ranks_take_two_families(changes, said):
    with pytest.raises(KeelError, match=said):
        expected(**(RANKED | changes))


@pytest.mark.parametrize(("arm", "against"), [("* · big", "* · huge"), ("* · big", "* · big")])
def test_families_must_be_there_and_differ(arm, against):
    axes = {"way": {way: {"train.warmup_steps": n} for n, way in enumerate(WAYS)}, "size": {"big": {}, "small": {"train.lr": 1e-5}}}
    told = {"says": "they rank alike", "expect": "higher"} | RANKED
    assert len(Study(name="s", question="?", axes=axes, predictions=[told]).resolved_arms()) == 8
    with pytest.raises(KeelError, match="ranks these pairs of arms"):
        Study(name="s", question="?", axes=axes, predictions=[told | {"arm": arm, "against": against}]).resolved_arms()


def ranked(big, small):
    """Runs whose last pass@1 is given for each way, seed by seed."""
    runs = [(f"{way} · {size}", seed, value) for size, table in (("big", big), ("small", small))
            for seed, row in enumerate(table) for way, value in zip(WAYS, row, strict=True)]  # fmt: skip
    return [Outcome(arm, seed, {"eval/pass@1": (Point(9, 1.0, float(value)),)}) for arm, seed, value in runs]


def test_ranks_are_compared_seed_by_seed():
    told = pairs_of(expected(**RANKED), ranked([[1, 2, 3, 4], [1, 2, 3, 4]], [[0.1, 0.2, 0.3, 0.4], [4, 3, 2, 1]]))
    assert told.seeds == (0, 1) and told.arm == pytest.approx((1.0, -1.0)) and told.reference == (0.0, 0.0)
    ties = pairs_of(expected(**RANKED), ranked([[1, 2, 2, 3]], [[1, 2, 3, 4]]))
    assert ties.arm[0] == pytest.approx(spearmanr([1, 2, 2, 3], [1, 2, 3, 4]).statistic)


def test_a_ranking_with_a_missing_run_is_no_pair():
    runs = ranked([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    runs[2] = Outcome("z · big", 0, {}, failure="boom")
    told = pairs_of(expected(**RANKED), runs)
    assert math.isnan(told.arm[0]) and told.missing == ("z · big, seed 0 failed: boom",)
    assert "rank correlation" in judge([pairs_of(expected(**RANKED), ranked([[1, 2, 3, 4]] * 3, [[1, 2, 3, 4]] * 3))])[0].words


# ── compute ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sigmoid_is_found_again():
    compute = np.linspace(0, 100, 21)
    reward = sigmoid(compute, 0.3, 0.9, 30.0, 1.7)
    assert reward[0] == 0.3 and sigmoid(np.array([30.0]), 0.3, 0.9, 30.0, 1.7)[0] == pytest.approx(0.6)
    assert fitted(compute[:11], reward[:11]) == pytest.approx((0.3, 0.9, 30.0, 1.7), rel=1e-3)
    missed, standing = misses(compute, reward)
    assert missed < 1e-4 and standing == pytest.approx(np.abs(reward[11:] - reward[10]).mean())


def test_a_sigmoid_needs_points():
    assert all(map(math.isnan, misses(np.arange(8.0), np.linspace(0, 1, 8))))
    curve = tuple(Point(step, float(step), value) for step, value in enumerate(sigmoid(np.arange(21.0), 0.1, 0.8, 5.0, 2.0)))
    assert value_at(curve, "eval/pass@1", "sigmoid-miss") < 1e-3 < value_at(curve, "eval/pass@1", "standing-miss")


# ── places ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CURVE = (Point(0, 0.0, 0.2), Point(10, 100.0, 0.8), Point(20, 300.0, 0.6))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("end", 0.6), ("mean", 1.6 / 3), ("best", 0.8), ("change", 0.4), ("fall", 0.2),
        ("area", (0.5 * 100 + 0.7 * 200) / 300), ("equal-tokens", 0.7), ("best-on-validation", 0.8),
    ],
)  # fmt: skip
def test_places(at, value):
    assert value_at(CURVE, "eval/pass@1", at, CURVE, tokens=200.0) == pytest.approx(value)


def test_the_end_of_what_is_logged_at_every_step_is_its_last_tenth():
    points = tuple(Point(n, 1.0, float(n)) for n in range(1, 41))
    assert value_at(points, "policy/entropy_nats", "end") == np.mean([37, 38, 39, 40])
    assert value_at(points, "eval/pass@1", "end") == 40 and mean_over_tokens(points) == np.mean(np.arange(1, 41))


def test_the_best_on_validation_is_read_elsewhere():
    other = (Point(0, 0.0, 0.9), Point(10, 100.0, 0.3), Point(20, 300.0, 0.7))
    assert value_at(other, "eval/x/pass@1", "best-on-validation", CURVE) == 0.3
    assert math.isnan(value_at(other[:1], "eval/x/pass@1", "best-on-validation", CURVE))


def test_series_know_their_tokens():
    rows = [{"step": 0, "eval/pass@1": 0.5}, {"step": 1, "tokens/total": 7, "length/mean": 3.0},
            {"step": 2, "tokens/total": 9, "length/mean": None, "eval/pass@1": None}]  # fmt: skip
    found = series(rows, ["eval/pass@1", "length/mean"])
    assert found["length/mean"] == (Point(1, 7.0, 3.0),) and found["eval/pass@1"][0] == Point(0, 0.0, 0.5)
    assert found["eval/pass@1"][1].tokens == 9.0 and math.isnan(found["eval/pass@1"][1].value)


# ── a whole study ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run(arm, seed, end, tokens=10.0, **changes):
    return Outcome(arm, seed, {"eval/pass@1": (Point(0, 0.0, 0.5), Point(4, tokens, end))}, steps=4, **changes)


def test_pairs_are_by_seed_and_say_who_is_missing():
    runs = [run("a", s, 0.5) for s in range(3)] + [run("b", 2, 0.8), run("b", 0, 0.6), run("b", 1, 0.9, failure="x\nboom\n")]
    told = pairs_of(expected(), runs)
    assert told.seeds == (0, 1, 2) and told.arm[0] == 0.6 and told.arm[2] == 0.8 and math.isnan(told.arm[1])
    assert told.missing == ("b, seed 1 failed: boom",) and told.differences == pytest.approx([0.1, 0.3])
    assert pairs_of(expected(), [run("a", 0, 0.5), run("b", 0, 0.5, ended=False)]).missing == ("b, seed 0 has not ended",)
    assert "1 of 3 pairs are missing: b, seed 1 failed: boom." in judge([told])[0].words


def test_an_arm_is_compared_with_its_start_or_a_number():
    runs = [run("a", 0, 0.7), run("b", 0, 0.9)]
    assert pairs_of(expected(against="start"), runs).differences == pytest.approx([0.4])
    assert pairs_of(expected(against="start", at="change"), runs).differences == pytest.approx([0.4])
    assert pairs_of(expected(against="", against_value=0.25), runs).differences == pytest.approx([0.65])


def test_equal_tokens_are_those_of_the_shorter_run():
    runs = [run("a", 0, 0.7, tokens=10.0), run("b", 0, 0.9, tokens=20.0)]
    assert pairs_of(expected(at="equal-tokens"), runs).differences == pytest.approx([0.7 - 0.7])


def test_unlike_numbers_of_tokens_are_told():
    rows = table([run("a", 0, 0.7, tokens=100.0), run("b", 0, 0.9, tokens=120.0)])
    assert unlike_tokens(rows) == ("Arms generated unlike numbers of tokens: a 100 a run, b 120.",)
    assert unlike_tokens(rows[:1]) == () == unlike_tokens(rows, share=0.2)


def test_a_crash_is_a_collapse_at_its_last_step():
    crashed = run("a", 0, 0.5, failure="boom")
    assert crashed.collapsed_step == 4 and math.isnan(crashed.last) and run("a", 0, 0.2).collapsed_step == 4
    assert table([crashed])[0]["collapsed"] == 1


def test_results_come_from_folders_and_are_small(tmp_path):
    study = Study(name="s", question="?", arms={"a": {}, "b": {}}, predictions=[
        {"says": "early", "arm": "b", "expect": "higher"}, {"says": "late", "arm": "b", "expect": "lower"}])  # fmt: skip
    jobs = jobs_of(study, study.resolved_arms(), tmp_path, 10)
    for job in jobs:
        job.out.mkdir(parents=True)
        end = 0.5 + 0.1 * (job.arm == "b") + 0.001 * ((7 * job.seed + len(job.arm)) % 10) * (job.arm == "b")
        rows = [{"step": 0, "eval/pass@1": 0.4}, {"step": 2, "tokens/total": 50, "eval/pass@1": end}]
        (job.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (job.out / "summary.json").write_text("{}")
    found = results(study, jobs, registered=study.predictions[:1])
    assert [each.verdict for each in found.verdicts] == ["supported", "points against it"]
    assert found.headline[0].startswith("Supported: early. eval/pass@1 (end): +0.10") and "after the first run" in found.headline[1]
    record = json.loads(text := compact(found.record(study, 10, False)))
    assert len(text) < 12_000 and text.count("\n") < 40 and record["headline"] == found.headline
    assert record["arms"][1]["curves"]["3"] == [[0, 0.0, 0.4], [2, 50.0, 0.602]]
    assert record["predictions"][0]["verdict"] == "supported" and len(record["predictions"][0]["values"]) == 10
    assert isinstance(found, Results) and record["arms"][0]["survival"]["steps"] == []
