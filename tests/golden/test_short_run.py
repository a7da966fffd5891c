"""Did numbers move? A short run against what was recorded. After a change that should move them, renew the record:

    KEEL_RENEW=1 .venv/bin/python -m pytest tests/golden

and give the change's entry in CHANGELOG.md the numbers before and after.
"""

import json
import os
from pathlib import Path

import pytest

from keel.run import train

RECORD = Path(__file__).with_name("short_run.json")
NAMES = ("reward/mean", "length/mean", "policy/entropy_nats", "train/loss", "train/grad_norm", "eval/pass@1", "eval/length_mean")


def run(recipe, folder):
    done = train(
        recipe,
        quiet=True,
        model="tiny-dense",
        task="arithmetic:medium",
        steps=3,
        out=str(folder),
        train={"prompts_per_step": 6, "group_size": 4, "lr": 1e-4, "updates_per_batch": 1, "dynamic_sampling": False},
        evaluation={"prompts": 12, "samples": 2, "every": 0},
        checkpoint={"every": 0},
    )
    rows = [json.loads(line) for line in done.folder.metrics.read_text().splitlines()]
    return [{name: row[name] for name in NAMES if name in row} for row in rows]


@pytest.mark.parametrize("recipe", ["solid", "grpo", "dapo"])
def test_numbers_are_as_recorded(recipe, tmp_path):
    told = run(recipe, tmp_path / "run")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("KEEL_RENEW"):
        RECORD.write_text(json.dumps(record | {recipe: told}, indent=1) + "\n")
        pytest.skip("recorded anew")
    for step, (now, then) in enumerate(zip(told, record[recipe], strict=True)):
        assert now == pytest.approx(then, rel=1e-3, abs=1e-6), f"step {step}"
