"""The command line: quick, explained, and in one paragraph when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib

import pytest

from keel.cli import COMMANDS, main
from keel.objectives.recipes import RECIPES


def ran(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    code = "import sys; from keel.cli import main; main(['--help']); "
    code += "print(sorted({'torch', 'pydantic'} & set(sys.modules)))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    assert done.stdout.endswith("[]\n") and "train" in done.stdout, done.stderr
    assert seconds < 5  # .1 s on an idle machine; the bound allows for a busy one


def test_importing_keel_imports_nothing_heavy():
    heavy = {"torch", "transformers", "matplotlib", "pydantic", "rich", "numpy"}
    code = f"import sys, keel; print(sorted({heavy} & set(sys.modules)), callable(keel.train))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[] True\n", done.stderr


def test_the_table_of_contents_is_true():
    import keel

    assert all(getattr(keel, name) is not None for name in keel.__all__ if name not in ("Run", "resume"))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = keel.trian


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command(capsys, arguments):
    code, out, _ = ran(capsys, *arguments)
    assert code == 0 and all(f"  {name}" in out for name in ("train", "eval", "pretrain", "papers", "export"))


def test_help_of_train_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "--train.lr " in out and "--sampling.max_completion_tokens" in out and "quickstart" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "--lr", "1"), "Did you mean 'train.lr'?"),
        (("train", "nosuch"), "No recipe is named 'nosuch'"),
        (("train", "missing.toml"), "There is no file 'missing.toml'"),
        (("train", "solid", "--train.group-size", "1"), "group of one"),
        (("train", "--resume", "nowhere"), "'nowhere' is not a run folder"),
        (("train", "--resume", "nowhere", "--seed", "3"), "nothing but --steps"),
        (("train", "--resume", "nowhere", "--steps", "many"), "a whole number of optimizer steps"),
        (("train", "solid", "grpo"), "Unrecognized arguments: grpo"),
        (("export", "nowhere"), "'nowhere' is not a run folder"),
        (("eval",), "source"),
        (("papers", "a", "b", "c"), "none, one or two"),
        (("papers", "dapoo"), "did you mean 'dapo'"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(capsys, arguments, said):
    code, out, err = ran(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("keel: ") and err.count("\n") == 1


def test_a_dry_run_prints_the_resolved_settings_and_what_they_amount_to(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ran(capsys, "train", "dapo", "--train.lr=1e-4", "--evaluation.ks", "1,2", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    settings = tomllib.loads(out)
    assert settings["train"]["lr"] == 1e-4 and settings["train"]["updates_per_batch"] == 16
    assert settings["evaluation"]["ks"] == [1, 2]
    assert "# completions_per_batch" in out


def test_a_dry_run_for_machines(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ran(capsys, "train", "--dry-run", "--json", "--seed", "5")
    told = json.loads(out)
    assert code == 0 and told["config"]["seed"] == 5 and told["derived"]["completions_per_update"] == 256


def test_a_setting_may_stand_before_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = ran(capsys, "train", "--train.lr", "1e-3", "grpo", "--dry-run", "--json")
    assert json.loads(out)["config"]["recipe"] == "grpo"


def test_a_plugin_is_found_where_one_stands(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_recipes.py").write_text(
        "from dataclasses import replace\n"
        "from keel.objectives.recipes import recipe, register\n"
        "register(replace(recipe('solid'), name='mine_of_the_test', updates_per_batch=3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        _, out, _ = ran(capsys, "train", "mine_of_the_test", "--plugins", "my_recipes", "--dry-run", "--json")
        assert json.loads(out)["derived"]["updates_per_batch"] == 3
    finally:
        RECIPES.pop("mine_of_the_test", None)
        sys.modules.pop("my_recipes", None)


def test_papers(capsys):
    _, out, _ = ran(capsys, "papers")
    assert all(name in out for name in RECIPES)
    _, out, _ = ran(capsys, "papers", "grpo")
    assert "2402.03300" in out and "GroupStd" in out
    _, out, _ = ran(capsys, "papers", "dapo", "grpo")
    assert "clip_high=0.28" in out and "dynamic_sampling" in out
    _, out, _ = ran(capsys, "papers", "dapo", "grpo", "--json")
    assert {"field", "a", "b", "source_a", "source_b"} == json.loads(out)[0].keys()
    _, out, _ = ran(capsys, "papers", "solid", "solid")
    assert "choose the same" in out


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def stopped(arguments):
        raise KeyboardInterrupt("Go on with: keel train --resume runs/mine")

    monkeypatch.setitem(COMMANDS, "papers", stopped)
    code, _, err = ran(capsys, "papers")
    assert code == 130 and "--resume runs/mine" in err
