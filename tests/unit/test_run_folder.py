"""The run folder: refuses to overwrite, can be cut back to any step, and never holds half a line."""

from __future__ import annotations

import io
import json
import math
import os
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest

from keel.config import RunConfig
from keel.curves import draw, smooth
from keel.errors import KeelError
from keel.files import append_jsonl, cut_jsonl, json_of, last_row, read_jsonl, write_atomically
from keel.run_folder import RunFolder, environment, git_revision, place_of
from keel.summary import against, closing_table, difference, moved, panel_name, skills_of, summarise
from keel.types import Group, Prompt, Score


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(RunConfig(out=str(tmp_path / "run"), seed=3), {"seed": 3})


def test_a_new_folder_holds_its_settings_and_its_manifest(folder, tmp_path):
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.toml", "manifest.json"]
    assert folder.config == RunConfig(out=str(tmp_path / "run"), seed=3)
    assert folder.manifest == {"seed": 3}
    assert RunFolder.open(folder.path) == folder


def test_an_existing_folder_is_refused_and_left_alone(folder):
    append_jsonl(folder.metrics, [{"step": 1}])
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(KeelError, match=r"exists already.*--resume .*run"):
        RunFolder.create(RunConfig(out=str(folder.path)), {})
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder.create(RunConfig(out=str(tmp_path / "run")), {}).config.out == str(tmp_path / "run")


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeelError, match="could not be written"):
        RunFolder.create(RunConfig(out=str(tmp_path / "file" / "run")), {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_name_each_run_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(task="jsonl:data/my rows.jsonl?prompt=q", seed=7)
    first = RunFolder.create(config, {}).path
    assert str(first) == "runs/solid-tiny-dense-jsonl-data-my-rows.jsonl-prompt-q-seed7"
    assert str(place_of(config)) == f"{first}-2"


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(KeelError, match="does not exist"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(KeelError, match="has no config.toml"):
        RunFolder.open(tmp_path)


def group(make_completion) -> Group:
    completions = make_completion([4, 5, 1]), make_completion([4], sample=1)
    scores = Score(1.0, correct=True), Score(None, reason="the grader timed out")
    return Group(Prompt("p", "1+1?", "2"), completions, scores)


def test_rollouts_tell_what_was_said_and_why_it_was_not_scored(folder, make_completion):
    folder.add_rollouts(4, [group(make_completion)])
    right, unscorable = read_jsonl(folder.rollouts)
    assert right == {
        "step": 4, "prompt_id": "p", "sample": 0, "prompt": "1+1?", "completion": "", "answer": "2",
        "reward": 1.0, "correct": True, "finish": "stop", "tokens": 3,
    }  # fmt: skip
    assert unscorable["reward"] is None and unscorable["unscorable"] == "the grader timed out"


def test_rollouts_tell_what_was_taken_for_the_answer(folder, make_completion):
    whole = group(make_completion)
    folder.add_rollouts(1, [replace(whole, scores=(Score(0.0, said="9" * 1000), Score(None, reason="late", said="7")))])
    assert [row["said"] for row in read_jsonl(folder.rollouts)] == ["9" * 400, "7"]


def test_cutting_back_forgets_later_steps_and_unfinished_lines(folder, make_completion):
    append_jsonl(folder.metrics, [{"step": step, "reward/mean": step / 7} for step in range(6)])
    for step in (1, 3, 5):
        folder.add_rollouts(step, [group(make_completion)])
    with open(folder.metrics, "a") as file:
        file.write('{"step": 6, "rew')
    assert [row["step"] for row in folder.rows()] == [0, 1, 2, 3, 4, 5]
    folder.cut_back(3)
    assert folder.rows() == [{"step": step, "reward/mean": step / 7} for step in range(4)]
    assert {row["step"] for row in read_jsonl(folder.rollouts)} == {1, 3}
    folder.cut_back(-1)
    assert folder.rows() == []


def test_cutting_back_a_run_that_wrote_nothing_yet(folder):
    folder.cut_back(0)
    assert folder.rows() == []


def test_numbers_that_json_cannot_say_become_null(tmp_path):
    append_jsonl(tmp_path / "m", [{"step": 1, "a": float("nan"), "b": math.inf, "c": 0.1 + 0.2}])
    assert list(read_jsonl(tmp_path / "m")) == [{"step": 1, "a": None, "b": None, "c": 0.1 + 0.2}]
    assert json.loads(json_of({"a": [float("nan"), {"b": -math.inf}]})) == {"a": [None, {"b": None}]}


@contextmanager
def files_of_at_most(size: int):
    """The system refuses to let any file grow beyond this many bytes, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_whole_lines_and_old_files(folder):
    append_jsonl(folder.metrics, [{"step": 1}])
    folder.finish({"steps": 1})
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(KeelError, match="no room on the disk for the metrics.jsonl"), files_of_at_most(4096):
        append_jsonl(folder.metrics, [{"step": 2, "long": "x" * 9000}])
    with pytest.raises(KeelError, match="no room on the disk for the summary.json"), files_of_at_most(4096):
        folder.finish({"long": "x" * 9000})
    with pytest.raises(KeelError, match="no room on the disk for the curves.png"), files_of_at_most(4096):
        draw([], folder.curves, "a run")
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_no_room_for_a_new_run_leaves_no_folder(tmp_path):
    with pytest.raises(KeelError, match="no room on the disk for the run folder"), files_of_at_most(100):
        RunFolder.create(RunConfig(out=str(tmp_path / "run")), {})
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_replaced_at_once(tmp_path):
    write_atomically(tmp_path / "latest", "a")
    write_atomically(tmp_path / "latest", "b")
    assert (tmp_path / "latest").read_text() == "b" and os.listdir(tmp_path) == ["latest"]
    cut_jsonl(tmp_path / "missing", 3)


def test_the_environment_names_versions_and_no_machine():
    told = environment()
    assert told["versions"]["torch"] and told["versions"]["python"].startswith("3.")
    assert os.uname().nodename not in json.dumps(told)


def test_outside_a_checkout_there_is_no_revision(tmp_path):
    assert git_revision(tmp_path) is None


ROWS = [
    {"step": 0, "eval/pass@1": 0.5, "eval/skills:reverse/pass@1": 0.8, "time/total_s": 1.0},
    {"step": 1, "policy/clip_frac": 0.0, "gap/max_abs_nats": 2e-5, "tokens/total": 100, "time/total_s": 2.0},
    {"step": 2, "policy/clip_frac": 0.1, "gap/max_abs_nats": 3e-5, "tokens/total": 180, "time/total_s": 3.5},
    {"step": 3, "gap/max_abs_nats": None, "eval/pass@1": 0.75, "eval/skills:reverse/pass@1": 0.7, "tokens/total": 250},
]


def test_the_summary_of_a_run():
    told = summarise(ROWS)
    assert told["eval"]["pass@1"] == {"before": 0.5, "after": 0.75}
    assert told["eval"]["panel"] == {"skills:reverse": {"before": 0.8, "after": 0.7}}
    assert (told["clip_frac_max"], told["gap_max_abs_nats"]) == (0.1, 3e-5)
    assert (told["steps"], told["tokens"], told["seconds"]) == (3, 250, 3.5)


def share(name, mean, half):
    return {f"eval/{name}/pass@1": mean, f"eval/{name}/pass@1_low": mean - half, f"eval/{name}/pass@1_high": mean + half}


def test_a_skill_has_its_change_with_an_interval():
    rows = [{"step": 0} | share("sort", 0.8, 0.03) | share("max", 0.5, 0.04), {"step": 7} | share("sort", 0.7, 0.04)]
    panel = summarise([*rows, {"step": 8} | share("max", 0.53, 0.03)])["eval"]["panel"]
    assert panel["sort"] == pytest.approx({"before": 0.8, "after": 0.7, "change": -0.1, "low": -0.15, "high": -0.05})
    assert panel["max"] == pytest.approx({"before": 0.5, "after": 0.53, "change": 0.03, "low": -0.02, "high": 0.08})


def test_what_was_measured_at_one_end_only_has_no_change():
    """A run that began before there was a panel, or one that has not ended."""
    late, early = (
        summarise([{"step": 0}, {"step": 3} | share("sort", 0.8, 0.1)]),
        summarise([{"step": 0} | share("sort", 0.8, 0.1)]),
    )
    assert late["eval"]["panel"]["sort"] == {"before": None, "after": 0.8}
    assert early["eval"]["panel"]["sort"] == {"before": 0.8, "after": None}


def test_the_engines_own_number_is_no_skill():
    assert [skill.name for skill in skills_of([share("sampler", 0.5, 0.1) | share("sort", 0.5, 0.1) | {"eval/pass@1": 0.5}])] == [
        "sort"
    ]


@pytest.mark.parametrize(("ends", "told"), [((0.1, 0.01, 0.2), "rose"), ((-0.1, -0.2, -0.01), "fell"), ((0.1, -0.01, 0.2), "same")])
def test_only_an_interval_without_zero_is_a_change(ends, told):
    assert moved(ends) == told and moved(None) == ""


def test_the_interval_of_a_difference_is_newcombes():
    """His example: 56/70 against 48/80, Wilson's intervals, method 10: .2 (.0524 to .3339)."""
    from keel.evaluate.estimates import wilson

    found = difference((48 / 80, *wilson(48 / 80, 80)), (56 / 70, *wilson(56 / 70, 70)))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_two_evaluations_side_by_side():
    before, after = {"eval/pass@1": 0.2} | share("sort", 0.8, 0.03), {"eval/pass@1": 0.4} | share("sort", 0.7, 0.04)
    told = against(before, after, "sums:2digit")
    assert told["sums:2digit"] == {"before": 0.2, "after": 0.4} and told["sort"]["change"] == pytest.approx(-0.1)
    assert against({}, after, "sums:2digit") == {}


def test_the_closing_words_tell_skills_apart():
    from rich.console import Console

    rows = [
        {"step": 0} | share("sort", 0.8, 0.03) | share("max", 0.5, 0.04),
        {"step": 7} | share("sort", 0.7, 0.04) | share("max", 0.5, 0.04),
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(closing_table(summarise(rows)))
    told = console.export_text()
    assert "-0.10 (-0.15 – -0.05) fell" in told and "+0.00 (-0.06 – +0.06)" in told and "rose" not in told
    assert max(map(len, told.splitlines())) <= 80


def test_the_engines_own_number_stands_apart():
    from rich.console import Console

    rows = [{"step": n} | share("sampler", 0.5, 0.1) | share("sort", 0.5, 0.1) for n in (0, 1)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(closing_table(summarise(rows)))
    lines = [line.split("  ")[0] for line in console.export_text().splitlines()]
    assert lines.index("engine's own pass@1") < lines.index("other skills, pass@1")


def test_the_summary_of_nothing():
    told = summarise([])
    assert told["eval"] == {"panel": {}} and told["steps"] == 0 and told["gap_max_abs_nats"] is None


def test_a_panel_task_with_options_gets_a_name_that_metrics_can_bear():
    assert panel_name("skills:reverse") == "skills:reverse"
    assert panel_name("jsonl:a/b.jsonl?prompt=q") == "jsonl:a-b.jsonl-prompt-q"


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS, [*ROWS, {"step": 4, "train/grad_norm": None}]])
def test_the_picture_is_drawn_whatever_there_is_to_draw(tmp_path, rows):
    draw(rows, tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and os.listdir(tmp_path) == ["curves.png"]


def test_a_moving_mean_keeps_a_constant_and_its_length():
    assert smooth([2.0] * 5, 3) == [2.0] * 5
    assert smooth([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]


def test_the_last_row_is_the_last_whole_one(tmp_path):
    place = tmp_path / "rows.jsonl"
    assert last_row(place) is None
    place.write_text('{"step": 1')
    assert last_row(place) is None
    place.write_text("".join(f'{{"step": {n}, "said": "{"x" * 1000}"}}\n' for n in range(1000)) + '{"step": 10')
    assert last_row(place)["step"] == 999
