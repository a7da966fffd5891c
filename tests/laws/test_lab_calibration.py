"""Verdicts keep their word: on draws like held-out accuracies, nulls are seldom called an effect, and effects are found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from keel.errors import KeelError
from keel.lab.calibration import calibrate, differences, recorded
from keel.lab.predictions import Prediction
from keel.lab.statistics import ALPHA, minimum_detectable
from keel.lab.verdicts import SUPPORTED, Pairs, calls, decisions

DRAWS = 10_000


def normal(rng, size):
    return rng.normal(0.85, 0.02, size)


def bounded(rng, size):
    """Accuracies near 1, skewed to the left, of 512 prompts."""
    return rng.binomial(512, rng.beta(46, 4, size)) / 512


def heavy(rng, size):
    """Student's t with 4 degrees of freedom, kept within [0, 1]."""
    return np.clip(0.7 + 0.03 * rng.standard_t(4, size), 0.0, 1.0)


FAMILIES = {"normal": normal, "bounded": bounded, "heavy": heavy}


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_null_is_no_effect_and_an_effect_is_found(family, seeds):
    """The recorded sample is large here, so that the true spread is known."""
    told = calibrate(family(np.random.default_rng(1), (1, 20_000)), seeds, DRAWS, seed=2)
    assert told.null_called <= 0.05 + told.error
    assert told.equal_wrong <= 0.05 + told.error
    assert told.found == pytest.approx(0.8, abs=0.05)
    assert told.equal_found == pytest.approx(0.8, abs=0.05)
    assert told.keeps_its_word


def test_an_alarm_rings_for_a_rule_that_calls_too_often():
    """Runs that share their luck within each half of an experiment: a test that takes them for independent calls too often."""
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 0.02, (DRAWS, 1)) + rng.normal(0, 0.01, (DRAWS, 10))
    supported, refuted = calls(shared, "higher", 0.0)
    assert supported.mean() + refuted.mean() > 0.3


def test_few_recorded_runs_are_drawn_with_putting_back_and_many_without():
    values = np.arange(8.0)[None, :]
    without = differences(values, 4, 200, np.random.default_rng(0))
    assert without.shape == (200, 4) and (without != 0).all()  # disjoint: no run meets itself
    assert (differences(values, 5, 200, np.random.default_rng(0)) == 0).any()


def test_draws_stay_within_an_arm():
    values = np.array([[0.1, 0.2, 0.3, 0.4], [100.1, 100.2, 100.3, 100.4]])
    assert np.abs(differences(values, 2, 500, np.random.default_rng(0))).max() < 1


def test_values_that_cannot_be_drawn_from_are_refused():
    with pytest.raises(KeelError, match="not all finite"):
        calibrate(np.array([[0.5, np.nan]]), 5)
    with pytest.raises(KeelError, match="at least two"):
        calibrate(np.array([[0.5]]), 5)


def test_recorded_runs_are_read_from_a_study_folder(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"arms": {"a": {}, "b · c": {}}}))
    for arm, ends in {"a": [0.5, 0.6, 0.7], "b-c": [0.4, 0.3, None]}.items():
        for seed, end in enumerate(ends):
            place = tmp_path / arm / str(seed)
            place.mkdir(parents=True)
            (place / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/pass@1": end}) + "\n")
            (place / "summary.json").write_text("{}")
    assert recorded(tmp_path).tolist() == [[0.5, 0.6], [0.4, 0.3]]  # the third seed has no pair
    with pytest.raises(KeelError, match="0 seeds under which every arm logs 'eval/pass@8'"):
        recorded(tmp_path, "eval/pass@8")
    with pytest.raises(KeelError, match="not a study folder"):
        recorded(tmp_path / "a")


def test_a_whole_study_of_nulls_calls_one_in_at_most_5_percent():
    """Holm over four predictions of one study, all of them null."""
    rng, studies = np.random.default_rng(4), 1000
    expected = [Prediction(says=str(n), arm=f"arm {n}", against="first", expect="higher") for n in range(4)]
    wrong = 0
    for _ in range(studies):
        runs = rng.normal(0.8, 0.03, (5, 10))
        told = decisions([pairs(each, arm, runs[0]) for each, arm in zip(expected, runs[1:], strict=True)])
        wrong += any(p_holm < ALPHA for _, _, p_holm in told)
    assert wrong / studies <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)


def test_what_is_said_to_be_detectable_is_detected():
    """On pairs, with the stated effect planted."""
    rng, found, studies = np.random.default_rng(5), 0, 1000
    effect = minimum_detectable(0.03 * np.sqrt(2), 10)
    expected = Prediction(says="more", arm="a", against="b", expect="higher")
    for _ in range(studies):
        lean, _, p = decisions([pairs(expected, rng.normal(0.7 + effect, 0.03, 10), rng.normal(0.7, 0.03, 10))])[0]
        found += lean == SUPPORTED and p < ALPHA
    assert found / studies == pytest.approx(0.8, abs=0.05)


def pairs(expected, a, b):
    return Pairs(expected, tuple(range(len(a))), tuple(a.tolist()), tuple(b.tolist()))
