"""Studies on a real Ray cluster: one machine, of these tests alone and on loopback.

What runs there equals what runs here, whoever is killed; a study that is stopped takes its own tasks with it and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from clusters import until

from keel import ray_cluster
from keel.errors import KeelError
from keel.files import read_jsonl
from keel.lab import on_ray
from keel.lab.job import at_work, run_one
from keel.lab.runner import jobs_of, run_jobs
from keel.lab.study import Study
from keel.settings import merged, nested

TINY = nested({
    "steps": 6, "train.prompts_per_step": 2, "train.group_size": 2, "evaluation.prompts": 4, "evaluation.samples": 1,
    "evaluation.every": 0, "sampling.max_completion_tokens": 8, "train.probe_every": 0, "checkpoint.every": 2,
})  # fmt: skip


def jobs_in(place: Path, arms: dict, seeds: int = 1, **changes):
    study = Study(name="s", question="?", base=merged(TINY, nested(changes)), arms=arms)
    return jobs_of(study, study.resolved_arms(), place, seeds)


def measured(out: Path) -> list[dict]:
    """What a run logged, but for the time that it took."""
    rows = read_jsonl(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/") and "per_s" not in name} for row in rows]


def killed_once(out: Path) -> None:
    """Kill the process that works on a run as soon as it has saved something."""
    until(lambda: list((out / "checkpoints").glob("*")), 300)
    os.kill(int(at_work(out).read_text().split()[1]), signal.SIGKILL)


def test_runs_end_as_they_would_here_and_a_killed_one_goes_on(tmp_path, cluster):
    arms = {"first": {}, "warm": {"sampling": {"temperature": 1.2}}}
    jobs = jobs_in(tmp_path / "there", arms, seeds=2)
    broken = jobs_in(tmp_path / "there", {"broken": {"task": "jsonl:nowhere.jsonl"}})
    said = []
    killer = threading.Thread(target=killed_once, args=(jobs[0].out,))
    killer.start()
    run_jobs([*broken, *jobs], None, said.append, cluster.address)
    killer.join()

    assert all(job.done and not job.failure for job in jobs) and "nowhere.jsonl" in broken[0].failure
    assert said[0] == "5 runs, 0 of them done" and said[-1].startswith("5/5 ") and "0 min left" in said[-1]
    assert [text for text in said if "first, seed 0: cut off; it goes on" in text] and sum("cut off" in text for text in said) == 1
    assert [path.name for path in (tmp_path / "there").rglob(".*")] == []  # no mark of the probe, none of a run at work

    here = jobs_in(tmp_path / "here", arms, seeds=2)
    for job, other in zip(jobs, here, strict=True):
        assert run_one(other.config) == ""  # what a local process does
        assert measured(job.out) == measured(other.out) and len(measured(job.out)) == 7

    stamps = [(job.out / "summary.json").stat().st_mtime_ns for job in jobs]
    run_jobs([*broken, *jobs], None, said.append, "127.0.0.1:1")  # nothing is left to do: no cluster is asked
    assert said[-1] == "5 runs, 5 of them done"
    assert stamps == [(job.out / "summary.json").stat().st_mtime_ns for job in jobs]


def test_it_waits_for_a_cpu_and_ctrl_c_saves_what_runs_and_leaves_the_cluster(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    (job,) = jobs_in(tmp_path, {"first": {}}, steps=5000)
    assert cluster.ask("hold") == 0
    said, handlers = [], [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Waiting: a run needs 1 CPU, and 0 of the Ray cluster's 3 are free"):
            cluster.ask("free")

    def interrupt() -> None:
        until(lambda: len(measured(job.out)) > 3, 300)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], 1, say, "auto")
    stopper.join()
    assert any(text.startswith("Waiting") for text in said) and said[-1].startswith("Stopping")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    rows = measured(job.out)
    assert not job.done and rows[-1]["step"] < 5000
    assert list((job.out / "checkpoints").glob(f"*{rows[-1]['step']}*"))  # saved at the step that it stopped after
    until(lambda: cluster.ask("how are you") == 3)


def test_ctrl_c_that_was_swallowed_on_its_way_is_heard_all_the_same():
    before = signal.getsignal(signal.SIGINT)
    with ray_cluster.presses_noted() as pressed:
        pressed()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(5)
        with pytest.raises(KeyboardInterrupt):
            pressed()
        pressed()  # once
    assert signal.getsignal(signal.SIGINT) == before


def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path, cluster, monkeypatch):
    (job,) = jobs_in(tmp_path, {"first": {}})
    monkeypatch.setattr(on_ray.os, "getcwd", lambda: str(tmp_path / "elsewhere"))
    with pytest.raises(KeelError, match=rf"Ray machine {socket.gethostname()} .*elsewhere: No such file or directory"):
        run_jobs([job], None, lambda text: None, cluster.address)
    assert not job.done and list(tmp_path.iterdir()) == [job.out.parent]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "Nothing listens at '127.0.0.1:1'"),
        ("ray://127.0.0.1:1", "Nothing listens at 'ray://127.0.0.1:1'"),
        ("local", "keel starts no Ray cluster"),
        ("nonsense", "no Ray cluster to be used at 'nonsense': ValueError"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_and_what_to_do(address, said, tmp_path):
    with pytest.raises(KeelError, match=f"{said}.*ray start --head"):
        run_jobs(jobs_in(tmp_path, {"first": {}}), None, lambda text: None, address)


def test_something_that_listens_and_is_no_cluster_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(KeelError, match=f"No Ray cluster answered at '{address}' within 3 s.*ray start --head"):
            run_jobs(jobs_in(tmp_path, {"first": {}}), None, lambda text: None, address)
