"""Studies: arms as overlays, equal budgets, runs that fail or are killed, and what is said in the end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest
from scipy import stats

from keel.config import load_config
from keel.errors import KeelError
from keel.evaluate.estimates import mean_interval
from keel.lab.command import run, tabulated
from keel.lab.differences import check_difference, check_folder, check_origins
from keel.lab.job import Job, run_one
from keel.lab.measures import Point, collapsed_at
from keel.lab.results import Outcome, outcome, table
from keel.lab.runner import build, folder_name, jobs_of, run_jobs, write_plan
from keel.lab.study import Collapse, Study, load_study, shipped_studies
from keel.lab.sweep import chosen, jobs_of_sweep, swept_arms
from keel.lab.tested import covered
from keel.run_folder import toml_of
from keel.settings import nested

TINY = nested({
    "steps": 2, "train.prompts_per_step": 2, "train.group_size": 2, "evaluation.prompts": 4, "evaluation.samples": 1,
    "evaluation.every": 0, "sampling.max_completion_tokens": 8, "train.probe_every": 0,
})  # fmt: skip


def study(**changes) -> Study:
    given = {"name": "s", "question": "?", "base": TINY, "arms": {"first": {}, "warm": {"sampling": {"temperature": 1.2}}}}
    return Study(**(given | changes))


def test_arms_are_overlays_and_seeds_are_shared():
    arms = study().resolved_arms()
    assert [arm.name for arm in arms] == ["first", "warm"] and arms[1].changes == {"sampling.temperature": 1.2}
    first, warm = (arm.seeded(3, Path("x"), 1).model_dump() for arm in arms)
    assert first["seed"] == warm["seed"] == 3 and warm["sampling"].pop("temperature") == 1.2
    first["sampling"].pop("temperature")
    assert first == warm


def test_fresh_seeds_leave_out_those_that_were_looked_at(tmp_path):
    fresh = study(first_seed=10)
    jobs = jobs_of(fresh, fresh.resolved_arms(), tmp_path, 2)
    assert sorted({job.seed for job in jobs}) == [10, 11] and all(job.config["seed"] == job.seed for job in jobs)


def test_axes_make_a_grid():
    axes = {"gap": {"none": {}, "bits": {"engine": {"weight_bits": 4}}}, "fix": {"plain": {}, "cut": {"train.lr": 1e-3}}}
    overlays = study(arms={}, axes=axes).overlays()
    assert list(overlays) == ["none · plain", "none · cut", "bits · plain", "bits · cut"]
    assert overlays["bits · cut"] == {"engine.weight_bits": 4, "train.lr": 1e-3}
    assert len({folder_name(name) for name in overlays}) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"arms": {"first": {}, "long": {"steps": 4}}},
            "Arm 'long' of study 's' has another budget than 'first': completions_total",
        ),
        ({"arms": {"odd": {"train": {"lrr": 1}}}}, "Arm 'odd' of study 's': There is no setting 'train.lrr'"),
        ({"arms": {}}, "neither arms nor axes"),
        ({"arms": {"first": {}, "more": {"train": {"dynamic_sampling": True}}}}, "dynamic sampling True against False"),
        ({"arms": {"lucky": {"seed": 7}}}, "Arm 'lucky' sets seed"),
        ({"base": TINY | {"out": "here"}}, "The base of study 's' sets out"),
        ({"confirm": True, "seeds": 9}, "with 9 seeds. Expected 10 or more"),
        ({"axes": {"a": {"b": {}}}}, "both arms and axes"),
    ],
)
def test_a_study_that_cannot_be_fair_is_refused(changes, said):
    with pytest.raises(KeelError, match=said):
        study(**changes).resolved_arms()


def test_a_recipe_is_taken_apart_in_the_difference():
    arms = study(arms={"solid": {}, "grpo": {"recipe": "grpo"}}, varies_budget=True).resolved_arms()
    assert arms[0].difference == {} and arms[1].difference["recipe"] == "grpo"
    assert "Clip" in arms[1].difference["objective.surrogate"] and "sampling.temperature" not in arms[1].difference


def test_a_difference_that_an_arm_does_not_say_is_refused():
    check_difference("a", ["recipe"], {"recipe": "dapo", "objective.surrogate": "Clip()", "train.dynamic_sampling": True})
    check_difference("a", ["objective.surrogate.clip_high"], {"objective.surrogate": "Clip()"})
    with pytest.raises(KeelError, match="changes train.lr, and it differs in train.eps = 1 too"):
        check_difference("a", ["train.lr"], {"train.lr": 1, "train.eps": 1})


def test_a_folder_of_another_run_is_refused(tmp_path):
    settings = study().resolved_arms()[0].seeded(0, tmp_path, 1).model_dump(mode="json")
    check_folder(tmp_path, settings)  # there is none yet
    other = study().resolved_arms()[1].config
    (tmp_path / "config.toml").write_text(toml_of(other))
    with pytest.raises(KeelError, match="sampling.temperature 1.2 .the study: 1.0."):
        check_folder(tmp_path, settings)
    (tmp_path / "config.toml").write_text("old_name = 1\n")
    (tmp_path / "manifest.json").write_text('{"versions": {"keel-rl": "0.0.1"}}')
    with pytest.raises(KeelError, match="made by keel 0.0.1, and this is keel .*old_name"):
        check_folder(tmp_path, settings)


def test_runs_of_other_data_are_no_comparison_and_other_versions_are_told(tmp_path):
    for seed, (torch, data) in enumerate([("2.13", "a"), ("2.13", "a"), ("2.12", "a"), ("2.13", "b")]):
        (tmp_path / str(seed)).mkdir()
        told = {"versions": {"torch": torch}, "task": {"name": "sums", "hash": data}}
        (tmp_path / str(seed) / "manifest.json").write_text(json.dumps(told))
    places = [tmp_path / str(seed) for seed in range(5)]  # the last one has not begun
    assert check_origins(places[:2]) == ()
    assert check_origins([*places[:3], places[4]]) == ("Runs differ in torch: 2.13 (2 runs), 2.12 (1 runs).",)
    with pytest.raises(KeelError, match="different versions of the task 'sums'"):
        check_origins(places)


def test_unknown_keys_and_studies_are_named():
    with pytest.raises(KeelError, match="qestion"):
        Study(name="s", qestion="?")
    with pytest.raises(KeelError, match="There is no study 'stair'"):
        load_study("stair")


def test_a_varied_budget_is_said():
    assert len(study(arms={"first": {}, "long": {"steps": 4}}, varies_budget=True).resolved_arms()) == 2


@pytest.mark.parametrize("name", shipped_studies())
@pytest.mark.parametrize("quick", [True, False])
def test_shipped_studies_construct(name, quick):
    made = load_study(name)
    assert made.name == name and made.resolved_arms(quick) and made.question and (made.prediction or made.predictions)


KILLER = """
import multiprocessing, os, pathlib, signal
mark = pathlib.Path({mark!r})
if multiprocessing.parent_process() is not None and {always} | (not mark.exists()):
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killing(tmp_path, monkeypatch, always: bool) -> Study:
    """A study one of whose arms kills the process that it runs in, once or always."""
    name = f"killer_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(KILLER.format(mark=str(tmp_path / "mark"), always=always))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return study(arms={"killed": {"plugins": [name]}})


def test_runs_end_and_are_not_made_again(tmp_path, capsys):
    plan = study(arms={"first": {}, "broken": {"task": "jsonl:nowhere.jsonl"}})
    arms, said = plan.resolved_arms(), []
    jobs = jobs_of(plan, arms, tmp_path, 1)
    run_jobs(jobs, 2, said.append)
    assert jobs[0].done and not jobs[0].failure and "nowhere.jsonl" in jobs[1].failure
    stamp = (jobs[0].out / "summary.json").stat().st_mtime_ns
    run_jobs(jobs, 2, said.append)
    assert said[-1] == "2 runs, 2 of them done" and (jobs[0].out / "summary.json").stat().st_mtime_ns == stamp
    rows = table([outcome(job) for job in jobs])
    assert rows[0]["gap/k3_nats"][0] < 1e-6 and rows[0]["failed"] == 0 and rows[1]["failed"] == rows[1]["collapsed"] == 1
    assert math.isnan(rows[1]["pass@1"][0]) and "broken" in tabulated(rows)


def test_a_killed_worker_loses_nothing(tmp_path, monkeypatch):
    plan = killing(tmp_path, monkeypatch, always=False)
    jobs, said = jobs_of(plan, plan.resolved_arms(), tmp_path / "out", 2), []
    run_jobs(jobs, 2, said.append)
    assert all(job.done and not job.failure for job in jobs) and any("cut off" in text for text in said)


def test_a_run_that_is_always_killed_is_reported(tmp_path, monkeypatch):
    plan = killing(tmp_path, monkeypatch, always=True)
    jobs = jobs_of(plan, plan.resolved_arms(), tmp_path / "out", 1)
    run_jobs(jobs, 1, lambda text: None)
    assert "lost 2 times: its process was killed" in jobs[0].failure


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    file = tmp_path / "long.toml"
    file.write_text('name = "long"\nquestion = "?"\n[base]\nsteps = 500\ntrain.prompts_per_step = 4\n[arms.only]\n')
    command = [sys.executable, "-m", "keel", "study", str(file), "--out", str(tmp_path / "out"), "--seeds", "1", "--workers", "1"]
    study = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "out" / "only" / "0" / "metrics.jsonl"
    _until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    study.kill()
    study.wait(10)

    def still() -> bool:
        before = metrics.stat().st_size
        time.sleep(1.5)
        return metrics.stat().st_size == before

    _until(still)


def _until(done, seconds=120.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


EXPECTED = {"says": "warmer is worse", "arm": "warm", "expect": "lower"}


def test_a_folder_keeps_to_its_plan(tmp_path):
    plan = study()
    write_plan(plan, plan.resolved_arms(), [], tmp_path)
    write_plan(study(seeds=7), plan.resolved_arms(), [], tmp_path)  # more seeds are welcome
    with pytest.raises(KeelError, match="another plan"):
        write_plan(study(question="another?"), plan.resolved_arms(), [], tmp_path)


def test_predictions_that_come_late_are_known_as_such(tmp_path):
    plan, late = study(predictions=[EXPECTED]), EXPECTED | {"says": "it is longer", "metric": "length/mean"}
    jobs = jobs_of(plan, plan.resolved_arms(), tmp_path, 1)
    assert len(write_plan(study(), plan.resolved_arms(), jobs, tmp_path)) == 0
    assert write_plan(plan, plan.resolved_arms(), jobs, tmp_path) == plan.predictions  # nothing has begun
    jobs[0].out.mkdir(parents=True)
    more = study(predictions=[EXPECTED, late])
    for _ in range(2):
        assert write_plan(more, plan.resolved_arms(), jobs, tmp_path) == plan.predictions


def test_the_command_runs_a_file(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nquestion = "Is it?"\n[base]\nsteps = 2\ntrain.prompts_per_step = 2\ntrain.group_size = 2\n'
                    'evaluation.prompts = 4\nevaluation.samples = 1\n[arms.only]\n')  # fmt: skip
    assert run(str(file), plan_only=True) == 0 and "1 arms × 5 seeds" in capsys.readouterr().out
    assert run(str(file), out=str(tmp_path / "out"), seeds=1, workers=1, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["arms"][0]["arm"] == "only"
        and told["arms"][0]["difference"] == [0.0, None, None]
        and told == json.loads((tmp_path / "out" / "results.json").read_text())
    )
    assert run(None) == 0


SWEEP = """
name = "swept"
question = "Is it?"
seeds = 1
sweep_seeds = 2
[base]
steps = 2
train.prompts_per_step = 2
train.group_size = 2
evaluation.prompts = 16
evaluation.samples = 1
evaluation.every = 0
sampling.max_completion_tokens = 8
[sweep]
train.lr = [1e-5, 1e3]
[arms.first]
[arms.warm]
sampling.temperature = 1.2
[[predictions]]
says = "warmer is worse"
arm = "warm"
expect = "lower"
"""


@pytest.mark.slow
def test_a_sweep_comes_first_on_other_seeds_and_its_best_value_is_taken(tmp_path, capsys):
    file, out = tmp_path / "swept.toml", tmp_path / "out"
    file.write_text(SWEEP)
    assert run(str(file), out=str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Too small to tell: warmer is worse.") and "at the edge of what was tried" in printed
    told = json.loads((out / "results.json").read_text())
    assert [each["arm"] for each in told["sweep"]] == ["first", "warm"] and all(each["runs"] == 4 for each in told["sweep"])
    for each in told["sweep"]:
        assert each["value"] == float(max(each["means"], key=each["means"].get)) and each["tokens"] > 0
        assert load_config(str(out / each["arm"] / "0" / "config.toml")).train.lr == each["value"]
    seeds = {load_config(str(path)).seed for path in (out / "_sweep").glob("*/*/*/config.toml")}
    assert seeds == {1_000_000, 1_000_001}


def test_a_run_that_failed_in_a_sweep_counts_as_nothing_right(tmp_path):
    plan = study(sweep={"train": {"lr": [1e-3, 1e-4]}}, sweep_seeds=1)
    arms = plan.resolved_arms()
    jobs = jobs_of_sweep(plan, arms, tmp_path)
    for job, end in zip(jobs, (0.3, None, 0.5, 0.6), strict=True):
        job.out.mkdir(parents=True)
        (job.out / "metrics.jsonl").write_text(json.dumps({"step": 2, "tokens/total": 9, "eval/pass@1": end or 0.9}) + "\n")
        (job.out / "summary.json").write_text("{}")
        if end is None:
            job.out.with_name(f"{job.out.name}.failed.txt").write_text("boom")
    found = chosen(plan, arms, jobs)
    assert [each.value for each in found] == [1e-3, 1e-4] and found[0].means == {1e-3: 0.3, 1e-4: 0.0}
    assert [arm.config.train.lr for arm in swept_arms(arms, found)] == [1e-3, 1e-4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": {"train.lr": [1e-3]}}, "one setting with two values"),
        ({"sweep": {"train.lr": [1e-3, 1e-2], "steps": [1, 2]}}, "one setting with two values"),
        ({"sweep": {"train.lr": [1e-3, 1e-2]}, "arms": {"first": {}, "own": {"train": {"lr": 1}}}}, "which the sweep chooses"),
        ({"sweep": {"train.lrr": [1e-3, 1e-2]}}, "There is no setting 'train.lrr'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes, said):
    with pytest.raises(KeelError, match=said):
        study(**changes).resolved_arms()


def test_what_has_ended_can_be_judged_without_a_run(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nquestion = "Is it?"\n[base]\nsteps = 2\n[arms.only]\n')
    assert run(str(file), out=str(tmp_path / "out"), judge_only=True) == 0 and "only" in capsys.readouterr().out
    assert not (tmp_path / "out" / "only").exists()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def made(arm, seed, last, first=0.5):
    return Outcome(arm, seed, {"eval/pass@1": (Point(0, 0.0, first), Point(2, 10.0, last))})


def test_differences_are_paired_by_seed():
    noise = [0.0, 0.2, 0.4]
    outcomes = [made("a", s, 0.3 + noise[s]) for s in range(3)] + [made("b", s, 0.35 + noise[s]) for s in (2, 0, 1)]
    row = table(outcomes)[1]
    assert row["difference"] == pytest.approx((0.05, 0.05, 0.05)) and row["pass@1"][0] == pytest.approx(0.55)


def test_the_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.5]
    expected = stats.t.interval(0.95, 3, loc=0.3, scale=stats.sem(values))
    assert astuple(mean_interval(values)) == pytest.approx((0.3, *expected), rel=1e-6)
    assert astuple(mean_interval([0.2, math.nan])) == (0.2, -math.inf, math.inf) and math.isnan(mean_interval([]).mean)


@pytest.mark.parametrize(
    ("curve", "place"),
    [
        ([0.5, 0.9, 0.44], 2),  # ends below half of its best
        ([0.5, 0.9, 0.46], None),
        ([0.5, 0.9, 0.44, 0.6], None),  # below it once, and back
        ([0.5, 0.9, 0.44, 0.4, 0.6], 2),  # twice in a row
        ([0.5, math.nan, 0.5], 1),
        ([], None),
        ([0.2, 0.1, 0.3], None),
    ],
)
def test_collapse_is_half_of_the_best(curve, place):
    assert collapsed_at(curve, Collapse()) == place


def test_a_run_that_failed_has_collapsed(tmp_path):
    job = Job("a", 0, tmp_path / "0", {})
    (tmp_path / "0.failed.txt").write_text("why")
    assert outcome(job).collapsed and math.isnan(outcome(job).last)


@pytest.mark.slow
def test_a_study_builds_its_own_data_once(tmp_path, capsys):
    study = Study(
        name="s", question="?", build={"tasks": ["arithmetic:easy"], "size": 16, "pool": 48, "samples": 4},
        base=TINY | {"task": "jsonl:{data}.unselected.jsonl?test={data}.test.jsonl&extract=marker"},
        arms={"unselected": {}, "selected": {"task": "jsonl:{data}.jsonl?test={data}.test.jsonl&extract=marker"}},
    )  # fmt: skip
    place = tmp_path / "out"
    place.mkdir()
    build(study, place, print)
    before = (place / "data.jsonl").stat().st_mtime_ns
    build(study, place, print)
    assert (place / "data.jsonl").stat().st_mtime_ns == before and capsys.readouterr().out == ""
    plain, selected = jobs_of(study, study.resolved_arms(), place, 1)
    assert plain.config["task"].startswith(f"jsonl:{place}/data.unselected.jsonl?test={place}/data.test.jsonl")
    assert run_one(selected.config) == "" and (selected.out / "summary.json").exists()
    with pytest.raises(KeelError, match="as `keel data build` has"):
        build(Study(**study.model_dump() | {"build": {"sizes": 3}}), tmp_path, print)


def test_a_study_pretrains_its_own_models_once(tmp_path):
    study = Study(
        name="s", question="?", models={".1M": {"size": ".1M", "steps": 2}},
        base=TINY, arms={"bundled": {}, "own": {"model": "{models}/.1M"}},
    )  # fmt: skip
    told = []
    build(study, tmp_path, told.append)
    build(study, tmp_path, told.append)
    assert told == ["pretraining the model '.1M', once"]
    job = jobs_of(study, study.resolved_arms(), tmp_path, 1)[1]
    assert job.config["model"] == f"{tmp_path}/models/.1M" and run_one(job.config) == ""
    assert covered([job]).model == ("{models}/.1M",) and covered([job]).parameters[0] < 150_000
    with pytest.raises(KeelError, match="models.x.size is .*field required"):
        Study(**study.model_dump() | {"models": {"x": {"sise": ".1M"}}})
    with pytest.raises(KeelError, match="Unknown size '2M'"):
        build(Study(**study.model_dump() | {"models": {"x": {"size": "2M"}}}), tmp_path, print)
