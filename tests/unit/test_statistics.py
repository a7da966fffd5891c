"""The lab's statistics against sums by hand and against scipy's other ways of computing the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from keel.errors import KeelError
from keel.lab import statistics as lab

VALUES = np.array([0.02, -0.01, 0.05, 0.03, 0.04])


def test_the_interval_is_students_along_the_last_axis():
    low, high = lab.t_interval(np.stack([VALUES, 2 * VALUES]), 0.9)
    expected = stats.t.interval(0.9, 4, loc=VALUES.mean(), scale=stats.sem(VALUES))
    assert (low[0], high[0]) == pytest.approx(expected) and high[1] == pytest.approx(2 * expected[1])
    assert [float(end) for end in lab.t_interval(VALUES[:1])] == [-math.inf, math.inf]


def test_one_sided_p_is_scipys():
    assert float(lab.t_above(VALUES, 0.01)) == pytest.approx(stats.ttest_1samp(VALUES, 0.01, alternative="greater").pvalue)
    assert lab.t_above(np.ones(1)) == 1.0
    flat = [float(lab.t_above(np.zeros(5), bound)) for bound in (-1.0, 0.0, 1.0)]
    assert flat == [1 / 32, 0.5, 31 / 32]


def test_the_bootstrap_is_seeded_and_has_an_answer_for_flat_values():
    many = np.random.default_rng(0).normal(size=12)
    assert lab.bootstrap_interval(many, 1) == lab.bootstrap_interval(many, 1) != lab.bootstrap_interval(many, 2)
    low, high = lab.bootstrap_interval(VALUES, 1)
    assert -0.01 < low < VALUES.mean() < high < 0.05
    assert lab.bootstrap_interval([0.5, 0.5, 0.5], 1) == (0.5, 0.5)
    assert all(map(math.isnan, lab.bootstrap_interval([], 1)))
    assert all(map(math.isfinite, lab.bootstrap_interval(np.array([0.0, 0.0, 1.0]), 1)))


def test_the_bootstrap_takes_another_statistic():
    low, high = lab.bootstrap_interval(np.array([0.1, 0.5, 0.52, 0.55, 0.9]), 0, lab.iqm)
    assert 0.1 <= low < 1.57 / 3 < high <= 0.9


def test_iqm_leaves_a_quarter_out_at_each_end():
    assert float(lab.iqm(np.array([100.0, 1.0, 2.0, 3.0, -100.0]))) == 2.0  # a quarter of 5, rounded down, is 1
    assert float(lab.iqm(np.arange(8.0))) == np.mean([2, 3, 4, 5])


def test_probability_of_improvement_is_counted_over_all_pairs():
    a, b = np.array([1.0, 2.0]), np.array([0.0, 2.0, 3.0])
    by_hand = [1.0, 0.0, 0.0, 1.0, 0.5, 0.0]
    assert lab.probability_of_improvement(a, b) == pytest.approx(np.mean(by_hand))
    assert math.isnan(lab.probability_of_improvement(a, np.array([])))


def test_sign_flips_are_counted_exactly():
    means = [abs(np.mean(np.array(signs) * VALUES)) for signs in itertools.product([1, -1], repeat=5)]
    by_hand = np.mean([mean >= VALUES.mean() - 1e-12 for mean in means])
    assert lab.sign_flip(VALUES, 0) == by_hand
    assert lab.sign_flip(np.abs(VALUES), 0) == 0.0625  # the smallest that 5 pairs allow
    assert lab.sign_flip(np.zeros(3), 0) == 1.0 == lab.sign_flip(np.array([]), 0)


def test_many_pairs_draw_their_flips_by_the_seed():
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    p = lab.sign_flip(values, 1)
    assert p == lab.sign_flip(values, 1) and p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert lab.sign_flip(values, 1, bound=float(values.mean())) > 0.9
    assert lab.sign_flip(np.ones(40), 1) >= 1 / lab.EXACT_FLIPS  # never 0: what was seen is one of the draws


def test_holm_by_hand():
    assert lab.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert lab.holm([0.9, 0.02]) == pytest.approx([0.9, 0.04]) and lab.holm([]) == [] and lab.holm([0.6, 0.7]) == [1.0, 1.0]


def test_power_is_what_draws_say():
    draws = np.random.default_rng(0).normal(0.5, 1.0, (20_000, 10))
    found = (stats.ttest_1samp(draws, 0, axis=1, alternative="greater").pvalue < 0.025).mean()
    assert float(lab.power(0.5, 1.0, 10)) == pytest.approx(found, abs=0.01)
    assert float(lab.power(-0.5, 1.0, 10)) == float(lab.power(0.5, 1.0, 10))


def test_power_of_equivalence_is_what_draws_say():
    draws = np.random.default_rng(0).normal(0.1, 1.0, (20_000, 20))
    both = [(stats.ttest_1samp(side * draws, -0.8, axis=1, alternative="greater").pvalue < 0.05) for side in (1, -1)]
    assert float(lab.equivalence_power(0.1, 0.8, 1.0, 20)) == pytest.approx((both[0] & both[1]).mean(), abs=0.01)


@pytest.mark.parametrize("seeds", [3, 5, 10, 40])
def test_the_detectable_effect_is_found_with_its_power(seeds):
    effect = lab.minimum_detectable(0.2, seeds)
    assert float(lab.power(effect, 0.2, seeds)) == pytest.approx(0.8) and float(lab.power(0.99 * effect, 0.2, seeds)) < 0.8
    margin = lab.minimum_margin(0.2, seeds)
    assert float(lab.equivalence_power(0.0, margin, 0.2, seeds)) == pytest.approx(0.8)


def test_nothing_is_detectable_with_one_seed_and_all_without_spread():
    assert lab.minimum_detectable(0.1, 1) == math.inf == lab.minimum_detectable(math.nan, 5)
    assert lab.minimum_detectable(0.0, 5) == 0.0


def test_seeds_needed_are_the_fewest_that_reach_the_power():
    needed = lab.seeds_needed(lambda n: lab.power(0.5, 1.0, n))
    assert needed == 34  # Cohen's table for d = .5, paired, two-sided .05, power .8
    assert lab.power(0.5, 1.0, needed) >= 0.8 > lab.power(0.5, 1.0, needed - 1)
    assert lab.seeds_needed(lambda n: lab.power(0.001, 1.0, n)) is None
    assert lab.seeds_needed(lambda n: lab.power(100.0, 1.0, n)) == 2


def test_survival_by_hand():
    told = lab.survival([30.0, 50.0], [40.0, 80.0])  # of 4 one falls at 30; one leaves at 40; of 2 one falls at 50
    assert told.steps == (30.0, 50.0) and told.share == pytest.approx((3 / 4, 3 / 4 * 1 / 2))
    assert all(0 <= low <= share <= high <= 1 for low, share, high in zip(told.low, told.share, told.high, strict=True))
    assert lab.survival([], [3.0]).steps == () and lab.survival([2.0, 2.0], []).share == (0.0,)
    with pytest.raises(KeelError, match="no runs"):
        lab.survival([], [])
