"""The shipped studies, each arm for a moment: every step of the staircase runs, and is the step that it says it is."""

from __future__ import annotations

import pytest

from keel.lab.results import outcome
from keel.lab.runner import jobs_of, run_jobs
from keel.lab.study import load_study
from keel.settings import dotted, merged, nested

MOMENT = nested({
    "steps": 8, "train.prompts_per_step": 2, "train.group_size": 4, "evaluation.prompts": 4, "evaluation.samples": 1,
    "evaluation.every": 0,
})  # fmt: skip


@pytest.mark.slow
def test_every_step_of_the_staircase_runs(tmp_path):
    study = load_study("staircase")
    study = study.model_copy(update={"base": merged(study.base, MOMENT)})
    arms = study.resolved_arms()
    jobs = jobs_of(study, arms, tmp_path, 1)
    run_jobs(jobs, 2, lambda text: None)
    told = {job.arm: outcome(job) for job in jobs}
    assert not [o.failure for o in told.values() if o.failure]
    assert told["on-policy"].numbers["gap/k3_nats"] < 1e-9 < 1e-5 < told["faster-engine"].numbers["gap/k3_nats"]
    assert told["on-policy"].numbers["train/staleness_mean"] == 0 < told["mini-batches"].numbers["train/staleness_mean"]
    assert 0 < told["ahead"].numbers["train/staleness_mean"] <= 10 and told["faster-engine"].sampler and not told["ahead"].sampler


@pytest.mark.parametrize("name", ["breaking", "routing"])
def test_arms_differ_in_their_axes_alone(name):
    study = load_study(name)
    values = [set(dotted(changes)) for axis in study.axes.values() for changes in axis.values()]
    for arm in study.resolved_arms(quick=True):
        assert set(arm.changes) <= set().union(*values)
