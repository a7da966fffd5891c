"""Runs with faults in them against `keel doctor RUN`, and healthy ones: the verdict is right, and only then is there an alarm.

A few of each kind. The whole table, with its rates, is `benchmarks/doctor.py`.
"""

import pytest
from broken_runs import HEALTHY, PAIRS, broken, healthy, named, part_is_right
from seeded import SEEDED

pytestmark = pytest.mark.usefixtures("one_thread")
SOME_FAULTS, SOME_PAIRS, SOME_HEALTHY = list(SEEDED)[4::9], PAIRS[1::7], HEALTHY[::10]
FROM_THE_FOLDER = ["the ratio is always 1", "a fresh group for every row"]  # what shows without the living system


def says(told):
    return [(f.fault.code, f.says) for f in told.diagnosis.findings]


def test_of_zero_reward_the_folder_tells_the_causes_apart(tmp_path):
    causes = ("a cap that cuts everything", "grader fails in threads", "grader is always 0", "too hard for the base")
    left_over = {(), ("difficulty",)}  # a few steps need not be enough to say so
    for place, name in enumerate(causes):
        told = broken((name,), tmp_path / str(place), folder_only=True, steps=8)
        assert max(row["reward/mean"] for row in told.record.trained) < 0.05, "the reward shows none of them"
        right = told.diagnosis.verdicts in left_over if name == causes[-1] else part_is_right(told, (name,))
        assert right, (name, says(told))
        assert told.diagnosis.next_probe.startswith("keel doctor ")


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_THE_FOLDER)
def test_the_folder_alone_shows(name, tmp_path):
    told = broken((name,), tmp_path / "run", folder_only=True, steps=8)
    assert told.diagnosis.verdicts[:1] == (SEEDED[name].part,), says(told)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_FAULTS)
def test_the_verdict_on_a_broken_run(name, tmp_path):
    told = broken((name,), tmp_path / "run")
    assert part_is_right(told, (name,)) and all(named(told, (name,))), says(told)


@pytest.mark.slow
@pytest.mark.parametrize("pair", SOME_PAIRS, ids=" + ".join)
def test_both_of_two_faults_are_named(pair, tmp_path):
    told = broken(pair, tmp_path / "run")
    assert part_is_right(told, pair) and all(named(told, pair)), says(told)


def test_a_healthy_run_is_healthy(tmp_path):
    told = healthy(
        "grpo", {"task": "arithmetic:medium?train_size=600&test_size=200", "train.updates_per_batch": 2}, tmp_path / "run"
    )
    assert told.diagnosis.healthy and not told.diagnosis.unknown, says(told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings"), SOME_HEALTHY, ids=[f"{recipe} {settings.get('seed', 0)}" for recipe, settings in SOME_HEALTHY]
)
def test_no_alarm_on_a_healthy_run(recipe, settings, tmp_path):
    told = healthy(recipe, settings, tmp_path / "run")
    assert told.diagnosis.healthy, says(told)
