"""Logs of other frameworks under keel's names, and what can be checked in them. `tests/fixtures/foreign` holds real ones, each with
the program that made it.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from keel.diagnostics.metrics import check_names
from keel.doctor.foreign import checks, read
from keel.doctor.foreign.names import FRAMEWORKS
from keel.errors import KeelError

LOGS = Path(__file__).parent.parent / "fixtures" / "foreign"


def written(folder, rows):
    """A log as verl's file logger writes it."""
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps({"step": step, "data": row}) + "\n" for step, row in enumerate(rows, start=1)))
    return read(file)


def found(log, **known):
    return [finding.fault.code for check in checks(log, **known) for finding in check.findings]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_name_of_ours_is_a_metric(framework):
    check_names(meaning.ours for meaning in FRAMEWORKS[framework])


def test_trl_is_read_from_its_state_as_it_was_logged():
    log = read(LOGS / "trainer_state.json")
    first = json.loads((LOGS / "trainer_state.json").read_text())["log_history"][0]
    assert log.framework == "trl" and [row["step"] for row in log.rows] == [1, 2, 3, 4]
    assert log.rows[0]["reward/mean"] == first["reward"]
    assert log.rows[0]["group/live_frac"] == 1 - first["frac_reward_zero_std"]
    assert "reward/mean" not in log.rows[1]  # the second update of a batch logs no reward
    assert found(log) == []


def test_verl_says_the_same_in_its_file_and_on_its_console():
    file, console = read(LOGS / "verl.jsonl"), read(LOGS / "verl.log")
    assert (file.framework, len(file.rows), len(console.rows)) == ("verl", 6, 3)
    assert [dict(row) for row in console.rows] == [pytest.approx(row) for row in file.rows[:3]]
    assert found(file, updates_per_batch=2) == []


def test_signs_are_turned_round_where_they_differ():
    log, told = read(LOGS / "verl.jsonl"), json.loads((LOGS / "verl.jsonl").read_text().splitlines()[0])["data"]
    assert log.rows[0]["gap/mean_nats"] == -told["rollout_corr/kl"]
    assert log.rows[0]["policy/log_ratio_mean_nats"] == -told["actor/ppo_kl"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_event_files_hold_what_the_state_holds():
    board, state = read(LOGS / "events.out.tfevents.trl"), read(LOGS / "trainer_state.json")
    assert board.rows[0]["reward/mean"] == pytest.approx(state.rows[0]["reward/mean"])
    assert [row["step"] for row in board.rows] == [row["step"] for row in state.rows]


def test_an_offline_run_of_wandb_is_read_up_to_where_it_was_torn(tmp_path):
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(console="off", silent=True))
    for step in range(1, 401):  # more than one block of the file
        run.log({"train/global_step": step, "train/reward": step / 1000, "train/entropy": 0.5, "train/kl": 0.0})
    run.finish()
    (file,) = tmp_path.rglob("*.wandb")
    log = read(file)
    assert file.stat().st_size > 2 * 32768 and log.framework == "trl"
    assert [row["reward/mean"] for row in log.rows] == [step / 1000 for step in range(1, 401)]
    file.write_bytes(file.read_bytes()[:-5000])
    assert 300 < len(read(file).rows) < 400 and found(log) == []


def test_a_package_that_is_missing_is_named(monkeypatch):
    from keel.doctor.foreign import files

    def missing(module):
        raise ImportError("No module named tensorboard")

    monkeypatch.setattr(files, "import_module", missing)
    with pytest.raises(KeelError, match=r"keel-rl\[tensorboard\]"):
        read(LOGS / "events.out.tfevents.trl")


def test_a_folder_gives_its_newest_state(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    shutil.copy(LOGS / "trainer_state.json", tmp_path / "checkpoint-4")
    shutil.copy(LOGS / "verl.jsonl", tmp_path)
    assert read(tmp_path).framework == "trl"


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": 2}\n', "step:1 - a/b:2\n"])
def test_what_is_nobodys_is_refused(tmp_path, text):
    (tmp_path / "some.jsonl").write_text(text)
    with pytest.raises(KeelError, match="Expected"):
        read(tmp_path / "some.jsonl")


def test_what_it_cannot_know_is_said(tmp_path):
    log = written(tmp_path, [{"critic/score/mean": 0.5, "actor/pg_loss": 0.1}])
    assert [line.split()[0] for line in log.missing][:2] == ["length/truncated_frac", "group/zero_advantage_frac"]


BASE = {"critic/score/mean": 0.4, "actor/grad_norm": 0.2, "response_length/clip_ratio": 0.1, "actor/entropy": 1.0}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"response_length/clip_ratio": 1.1}, "K174"),
        ({"actor/entropy": -0.2}, "K174"),
        ({"rollout_corr/k3_kl": -0.01}, "K174"),
        ({"actor/ppo_kl": 0.0}, "K122"),
        ({"critic/score/mean": 0.0, "response_length/clip_ratio": 1.0}, "K620"),
    ],
)
def test_what_cannot_be_is_found(tmp_path, changes, code):
    log = written(tmp_path, [BASE | changes] * 4)
    assert found(log, updates_per_batch=2) == [code]


def test_a_ratio_of_one_is_right_with_one_update_and_unknown_where_nobody_says(tmp_path):
    log = written(tmp_path, [BASE | {"actor/ppo_kl": 0.0}] * 4)
    assert found(log, updates_per_batch=1) == found(log) == []


def test_an_engine_that_never_draws_some_of_the_mass_is_found(tmp_path):
    """mean exp(gap) = k3 − kl + 1: here .9, and each batch a little otherwise; around 1 it is silence."""

    def rows(mean):
        return [BASE | {"rollout_corr/kl": 0.02, "rollout_corr/k3_kl": 0.02 + mean - 1 + 0.001 * (i % 3 - 1)} for i in range(30)]

    assert found(written(tmp_path, rows(0.99))) == ["K211"]
    assert found(written(tmp_path, rows(1.0))) == []
