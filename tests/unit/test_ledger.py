"""The ledger: results that are kept, what replaces what, and that everything is told, good or bad."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from keel.errors import KeelError
from keel.lab.command import run
from keel.lab.kept import check_keep, keep_results, read_kept
from keel.lab.ledger import CERTIFIED, QUESTIONS, Entry, entries, ledger
from keel.lab.picture import mean_curve
from keel.lab.results import results
from keel.lab.runner import jobs_of
from keel.lab.study import Study, load_study, shipped_studies
from keel.lab.tested import covered, planned
from keel.objectives.estimators import ESTIMATORS
from keel.objectives.recipes import RECIPES

BETTER = {"says": "b ends higher", "arm": "b", "expect": "higher"}


def study(**changes) -> Study:
    return Study(**{"name": "s", "question": "Is b better?", "source": "nobody", "arms": {"a": {}, "b": {}},
                    "predictions": [BETTER], "base": {"steps": 4, "evaluation": {"samples": 1}}} | changes)  # fmt: skip


def record(place: Path, plan: Study | None = None, seeds: int = 10, gain: float = 0.1, quick: bool = False, broken: str = "",
           unended: int = 0) -> dict:  # fmt: skip
    """Results of runs that are written down here: b ends higher than a by about `gain`.

    Args:
        broken: why seed 1 of b failed.
        unended: of the last seeds b has no end.
    """
    plan = plan or study()
    jobs = jobs_of(plan, plan.resolved_arms(quick), place, seeds)
    for job in jobs:
        job.out.mkdir(parents=True, exist_ok=True)
        if broken and (job.arm, job.seed) == ("b", 1):
            job.out.with_name("1.failed.txt").write_text(broken)
        elif job.arm == "a" or job.seed < seeds - unended:
            end = 0.5 + (job.arm == "b") * (gain + 0.001 * (job.seed % 3))
            rows = [{"step": 0, "eval/pass@1": 0.4}, {"step": 4, "tokens/total": 50, "eval/pass@1": end}]
            (job.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (job.out / "summary.json").write_text('{"seconds": 360.0}')
        manifest = {"git": {"revision": "abcdef1234", "changed": job.seed == 0}, "versions": {"torch": "2.13"},
                    "model": {"name": "tiny-dense", "parameters": 1234, "hash": "m"},
                    "task": {"name": "sums", "test": 40, "hash": "t"}}  # fmt: skip
        (job.out / "manifest.json").write_text(json.dumps(manifest))
    return results(plan, jobs, quick).record(plan, seeds, quick, f"keel study s.toml{' --quick' * quick}")


def written(folder: Path, **changes) -> Path:
    """A file of results with other values for some keys; None takes a key out."""
    folder.mkdir(exist_ok=True)
    told = record(folder / "runs") | changes
    file = folder / "s.json"
    file.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return file


# ── what was tested ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_range_comes_from_the_runs(tmp_path):
    told = record(tmp_path)["range"]
    assert told["model"] == ["tiny-dense"] and told["parameters"] == [1234] and told["steps"] == [4]
    assert told["items"] == [40]  # the task has fewer prompts than an evaluation asks for
    assert told["revisions"] == {"abcdef1": 18, "abcdef1+": 2} and told["versions"]["torch"] == ["2.13"]
    assert told["hours"] == pytest.approx(20 * 0.1)


def test_every_value_of_a_setting_is_told_once():
    plan = study(arms={"a": {}, "b": {"train": {"lr": 1e-3}}, "c": {"train": {"lr": 1e-3}}}, base={"train": {"lr": 1e-4}})
    assert planned(plan).lr == (1e-4, 1e-3) and planned(plan).hours == 0 and not planned(plan).revisions


def test_where_a_studys_own_data_lie_is_not_told(tmp_path):
    plan = study(build={"tasks": ["arithmetic:easy"]}, base={"task": "jsonl:{data}.jsonl?extract=marker"})
    assert covered(jobs_of(plan, plan.resolved_arms(), tmp_path / "out", 1)).task == ("jsonl:{data}.jsonl?extract=marker",)


def test_what_a_study_makes_first_is_told(tmp_path):
    plan = study(build={"tasks": ["easy", "hard"], "size": 60}, sweep={"train": {"lr": [1e-4, 2e-4]}})
    size = Entry("s", plan, None).size
    assert size.endswith(
        "; data built with tasks = easy / hard, size = 60; each arm with the best of train.lr = 0.0001 / 0.0002 on other seeds"
    )


# ── keeping ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_kept_is_read_again(tmp_path):
    told = record(tmp_path / "runs")
    assert keep_results(told, tmp_path / "kept") == tmp_path / "kept" / "s.json"
    kept = read_kept(tmp_path / "kept")["s"]
    assert kept.predictions[0].verdict == "supported" and kept.command == "keel study s.toml"
    assert [(arm.arm, arm.runs, arm.ended) for arm in kept.arms] == [("a", 10, 10), ("b", 10, 10)]


def test_a_quick_size_replaces_no_full_one(tmp_path):
    full, quick = record(tmp_path / "full", seeds=2), record(tmp_path / "quick", quick=True, seeds=10)
    keep_results(quick, tmp_path)
    keep_results(full, tmp_path)  # though it has fewer runs
    before = (tmp_path / "s.json").read_text()
    for ask in (lambda: check_keep("s", tmp_path, quick=True), lambda: keep_results(quick, tmp_path)):
        with pytest.raises(KeelError, match="holds results of the full size, and these are of the quick one.*delete the file"):
            ask()
    assert (tmp_path / "s.json").read_text() == before


def test_fewer_runs_replace_no_more_runs(tmp_path):
    keep_results(record(tmp_path / "all"), tmp_path)
    keep_results(record(tmp_path / "again"), tmp_path)
    with pytest.raises(KeelError, match="holds results of 20 runs, and these are of 17"):
        keep_results(record(tmp_path / "part", unended=3), tmp_path)


def test_results_of_an_older_version_can_be_replaced(tmp_path):
    told = record(tmp_path / "runs", seeds=2)
    old = {key: value for key, value in told.items() if key not in ("range", "plan", "command")}
    old["arms"] = [{key: value for key, value in row.items() if key != "ended"} for row in old["arms"]]
    (tmp_path / "s.json").write_text(json.dumps(old))
    with pytest.raises(KeelError, match="keel study s --judge --keep"):
        read_kept(tmp_path)
    keep_results(told, tmp_path)
    assert read_kept(tmp_path)["s"].seeds == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"range": None, "command": None}, r"s.json is not as this version .*: it lacks command, range\. .*--judge --keep"),
        ({"arms": [{"arm": "a"}]}, r"it lacks arms.0.runs, arms.0.ended, arms.0.failed, arms.0.collapsed, and 1 more"),
        ({"predictions": "none"}, "predictions is 'none'"),
        ({"study": "other"}, r"holds results of study 'other'. Expected them in .*other.json: rename it"),
    ],
)
def test_results_that_cannot_be_read_are_named_with_what_to_do(tmp_path, changes, said):
    written(tmp_path, **changes)
    with pytest.raises(KeelError, match=said):
        read_kept(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ("[1]", "holds no table"), ('"x"', "holds no table"), ("\xff", "")]
)
def test_files_that_are_no_results_are_named(tmp_path, text, said):
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    for ask in (lambda: read_kept(tmp_path), lambda: check_keep("s", tmp_path, quick=False)):
        with pytest.raises(KeelError, match=f"s.json .*{said}.*delete the file"):
            ask()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KeelError, match="no folder .*--keep"):
        ledger(tmp_path / "nowhere")


def test_a_picture_stands_beside_what_is_kept(tmp_path):
    from matplotlib.image import imread

    told = record(tmp_path / "runs", broken="boom", unended=3)
    picture = keep_results(told, tmp_path / "kept").with_suffix(".png")
    height, width, _ = imread(picture).shape
    assert width > 2 * height and "![held-out pass@1 of each arm](kept/s.png)" in ledger(tmp_path / "kept")
    curves = {"0": [[0, 0.0, 0.2], [8, 9.0, 0.6]], "1": [[0, 0.0, 0.4], [8, 9.0, None]]}
    assert mean_curve(curves) == (
        [0, 8],
        [pytest.approx(0.3), 0.6],
    )
    picture.unlink()
    assert "kept/s.png" not in ledger(tmp_path / "kept")


# ── what is said ──────────────────────────────────────────────────────────────────────────────────────────────────────


def page(tmp_path: Path, told: dict) -> str:
    keep_results(told, tmp_path / "kept")
    return ledger(tmp_path / "kept")


def test_a_study_is_told_with_its_range_and_its_command(tmp_path):
    text = page(tmp_path, record(tmp_path / "runs"))
    assert "### s\n" in text and "Is b better? Source: nobody." in text and "Predictions judged: 1; supported: 1." in text
    assert "`tiny-dense` (1,234 parameters)" in text and "2 arms × 10 seeds × 4 steps of 32 × 8" in text and "40 held-out" in text
    assert (
        "Made by `keel study s.toml` in 2.0 hours of one process" in text
        and "revision `abcdef1` (2 of 20 runs with changes" in text
    )
    assert "| b ends higher | supported | eval/pass@1 (end): +0.101 (95 % of 10 pairs: +0.100 to +0.102)" in text
    assert not any(word in text for word in ("fail", "collapse", "have not ended", str(tmp_path), "not judged"))


def test_what_failed_collapsed_or_has_not_ended_is_told(tmp_path):
    text = page(tmp_path, record(tmp_path / "runs", broken="Traceback\nValueError: a | b", unended=3))
    assert "**3 of 20 runs have not ended: b 3 of 10.**" in text
    assert "**1 run failed: b 1 of 10 (b, seed 1: ValueError: a | b).**" in text and "**1 run collapsed: b 1 of 10.**" in text
    assert "| b ends higher | points to it (a hint) |" in text and "4 of 10 pairs are missing" in text


def test_a_quick_size_is_a_hint_and_says_so(tmp_path):
    text = page(tmp_path, record(tmp_path / "runs", seeds=2, quick=True))
    assert "**The quick size: hints at most.**" in text and "| supported |" not in text and "`keel study s.toml --quick`" in text


def test_a_refuted_prediction_is_told_as_plainly(tmp_path):
    text = page(tmp_path, record(tmp_path / "runs", gain=-0.1))
    assert "| b ends higher | refuted |" in text and "refuted: 1" in text


def test_text_of_others_stays_text(tmp_path):
    says = "a | b \\| `c`\n## d <script>x</script> *e* [f](g)"
    plan = study(predictions=[BETTER | {"says": says}], question="one\n\n| two", source="x|y")
    text = page(tmp_path, record(tmp_path / "runs", plan))
    row = next(line for line in text.split("\n") if line.startswith("| a "))
    assert row.startswith("| a \\| b \\\\\\| \\`c\\` ## d \\<script>x\\</script> \\*e\\* \\[f\\](g) | supported |")
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 4 and "\n## d" not in text and "\n| two" not in text


def test_a_study_whose_file_has_changed_says_so(tmp_path, monkeypatch):
    keep_results(record(tmp_path / "runs"), tmp_path / "kept")
    kept = read_kept(tmp_path / "kept")["s"]
    plan = study(base={"steps": 8, "evaluation": {"samples": 1}}, arms={"a": {}, "b": {}, "c": {}},
                 predictions=[BETTER | {"margin": 0.2}])  # fmt: skip
    monkeypatch.setattr("keel.lab.ledger.entries", lambda folder: {"s": Entry("s", plan, kept)})
    text = ledger(tmp_path / "kept")
    assert "The study's file has changed since these runs: base steps, arms c." in text
    assert "No longer in the study's file: b ends higher." in text and "| b ends higher | not judged yet |  |" in text
    monkeypatch.setattr("keel.lab.ledger.entries", lambda folder: {"s": Entry("s", study(), kept)})
    assert "changed" not in ledger(tmp_path / "kept").replace("with changes", "") and "not judged" not in ledger(tmp_path / "kept")


def test_every_shipped_study_is_there_run_or_not(tmp_path):
    (tmp_path / "kept").mkdir()
    found = entries(tmp_path / "kept", all_shipped=True)
    assert list(found) == sorted(shipped_studies()) and not entries(tmp_path / "kept")
    for name, entry in found.items():
        assert entry.command == f"keel study {name}" and len(entry.unjudged) == len(load_study(name).predictions)
        assert f"× {load_study(name).seeds} seeds ×" in entry.size


def test_questions_and_certificates_are_there():
    assert {*QUESTIONS, *CERTIFIED} <= set(shipped_studies()) and set(QUESTIONS) <= set(CERTIFIED)
    assert {name for names in CERTIFIED.values() for name in names} <= {*RECIPES, *ESTIMATORS, "pass@k"}


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_keeps_and_lists(tmp_path, capsys):
    file, kept = tmp_path / "mine.toml", tmp_path / "kept"
    file.write_text('name = "mine"\nquestion = "Is it?"\n[base]\nsteps = 2\n[arms.only]\n')
    how = {"out": str(tmp_path / "out"), "judge_only": True, "keep": str(kept)}
    assert run(str(file), **how) == 0 and f"Kept as {kept / 'mine.json'}" in capsys.readouterr().err
    assert run(None, keep=str(kept)) == 0
    told = capsys.readouterr().out
    assert "### mine" in told and "5 of 5 runs have not ended" in told and "no run has begun" in told
    with pytest.raises(KeelError, match="results of the full size"):
        run(str(file), quick=True, **how)
    assert not (tmp_path / "runs").exists()
    assert run(str(file), seeds=7, **how) == 0 and read_kept(kept)["mine"].command == f"keel study {file} --seeds 7"
