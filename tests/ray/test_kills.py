"""kill -9 of any process of a run on a cluster, at any time: the run ends, and trained on the same as if nobody had been killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from clusters import TRAINER, WORKER, at_work, until
from runs import begun, check_whole, resumed, settings_of, step_of

from keel.files import read_jsonl

STEPS = 60  # for each kill
LATEST = 12.0  # seconds between one and the next, where it goes by the clock: processes load for most of them


def kill(cluster, rng: random.Random, *titles: str) -> str:
    """Kill one process of a run, whichever, whatever it does; which it was."""
    until(lambda: at_work(cluster, *titles))
    pid = rng.choice(sorted(at_work(cluster, *titles)))
    title = Path(f"/proc/{pid}/cmdline").read_text().strip("\0 ")
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in at_work(cluster, *titles))
    return title


def killed(cluster, out: Path, kills: int, rng: random.Random, *titles: str) -> list[str]:
    """Kill that many, in turn by the step and by the clock, each before the run has done its share of steps; which they were."""
    found = []
    for number in range(kills):
        moment = time.monotonic() + (rng.uniform(0, LATEST) if number % 2 else 1000)
        step = number * STEPS + rng.randrange(1, STEPS - 20)
        until(lambda moment=moment, step=step: time.monotonic() > moment or step_of(out) >= step, 200)
        time.sleep(rng.uniform(0, 0.3))
        found.append(f"{kill(cluster, rng, *titles)} after step {step_of(out)}")
    return found


@pytest.mark.parametrize(
    ("kills", "workers", "trainers", "titles"),
    [(4, 2, 1, (WORKER, TRAINER)), (1, 1, 2, (TRAINER,)), pytest.param(20, 2, 1, (WORKER, TRAINER), marks=pytest.mark.slow)],
)
def test_whoever_is_killed_the_run_ends_and_no_prompt_is_lost_or_trained_twice(cluster, tmp_path, kills, workers, trainers, titles):
    rng, steps = random.Random(kills), kills * STEPS
    with begun(cluster, tmp_path / "run", steps, f"--train-workers={trainers}", workers=workers) as keel:
        try:
            found = killed(cluster, tmp_path / "run", kills, rng, *titles)
            said, _ = keel.communicate(timeout=300 + 20 * kills)
        finally:
            keel.kill()
    print(*found, sep="\n")
    assert keel.returncode == 0, said
    assert len(found) == kills and said.count("a trainer was lost") == sum(title.startswith(TRAINER) for title in found), said
    check_whole(tmp_path / "run", settings_of(cluster, steps))
    until(lambda: not at_work(cluster, WORKER, TRAINER))


def test_a_killed_worker_is_replaced_and_counted(cluster, tmp_path):
    rng = random.Random(0)
    with begun(cluster, tmp_path / "run", 3 * STEPS) as keel:
        try:
            until(lambda: step_of(tmp_path / "run") >= 1, 200)
            for _ in range(2):
                kill(cluster, rng, WORKER)
                until(lambda: len(at_work(cluster)) == 2 and keel.poll() is None)
            said, _ = keel.communicate(timeout=200)
        finally:
            keel.kill()
    assert keel.returncode == 0 and said.count("a rollout worker died and is replaced") == 2, said
    check_whole(tmp_path / "run", settings_of(cluster, 3 * STEPS))
    assert [*read_jsonl(tmp_path / "run" / "metrics.jsonl")][-1]["sampling/workers_lost"] == 2


def test_a_killed_trainer_takes_its_workers_along_and_goes_on_by_hand(cluster, tmp_path):
    """Where `keel train` trains itself there is nobody left to begin it again."""
    with begun(cluster, tmp_path / "run", STEPS) as trainer:
        try:
            until(lambda: step_of(tmp_path / "run") >= 7, 200)
        finally:
            trainer.kill()
    until(lambda: not at_work(cluster))
    assert step_of(tmp_path / "run") < STEPS
    resumed(tmp_path / "run")
    check_whole(tmp_path / "run", settings_of(cluster, STEPS))
