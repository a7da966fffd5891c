"""Ray Train starts processes and joins them; `keel train` is one rank in each, and trains as one process does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import keel

pytest.importorskip("ray.train.torch")

SMALL = {
    "steps": 3, "task": "arithmetic:easy", "train.prompts_per_step": 3, "train.group_size": 4, "evaluation.prompts": 4,
    "evaluation.samples": 1, "evaluation.every": 0, "evaluation.standard_panel": False,
}  # fmt: skip
STARTED = """
import json, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def loop(settings):
    import keel
    keel.train("solid", quiet=True, **settings)

address, settings, store = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
ray.init(address, log_to_driver=False)
shape, where = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}), RunConfig(storage_path=store)
TorchTrainer(loop, train_loop_config=settings, scaling_config=shape, torch_config=TorchConfig("gloo"), run_config=where).fit()
"""


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ray_train_starts_what_torchrun_does(cluster, tmp_path, parallel):
    whole, started = tmp_path / "whole", tmp_path / "started"
    keel.train("solid", quiet=True, out=str(whole), **SMALL)
    settings = json.dumps(SMALL | {"out": str(started), "train.parallel": parallel})
    words = [sys.executable, "-c", STARTED, cluster.address, settings, str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((started / "manifest.json").read_text())["ranks"] == 2
    assert rows(whole, "rollouts.jsonl") == rows(started, "rollouts.jsonl")
    one, two = (
        [row["train/grad_norm"] for row in rows(folder, "metrics.jsonl") if "train/grad_norm" in row] for folder in (whole, started)
    )
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-3)
