"""A run that is killed and resumed equals the run that never stopped, bit for bit: twice in a row, across an epoch's end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
KEEL = [sys.executable, "-c", "import sys; from keel.cli import main; sys.exit(main())"]
STEPS = 14


def command(folder, rows, recipe):
    return [
        *KEEL, "train", recipe, "--task", f"jsonl:{rows}?prompt=question&answer=gold", "--out", str(folder), "--steps", str(STEPS),
        "--train.prompts_per_step", "4", "--train.group_size", "4", "--train.lr", "1e-3", "--train.warmup_steps", "5",
        "--train.updates_per_batch", "2", "--train.dynamic_sampling", "false", "--sampling.max_completion_tokens", "14",
        "--checkpoint.every", "2", "--record.tokens_every", "2", "--evaluation.every", "6",
        "--evaluation.prompts", "2", "--evaluation.samples", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Fourteen sums: an epoch ends in the middle of a batch."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    pairs = [(a, b) for a in range(1, 5) for b in range(3, 7)][:14]
    path.write_text("".join(json.dumps({"question": f"{a}+{b}=\n", "gold": str(a + b)}) + "\n" for a, b in pairs))
    return path


def steps_on_disk(folder):
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def killed_after(words, folder, lines):
    """Start the command, and SIGKILL it as soon as its log has that many lines."""
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while steps_on_disk(folder) < lines and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert process.returncode == -signal.SIGKILL


def finished(words):
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def told(folder):
    """Everything but the times: weights and optimizer, metrics, and who was asked what and said what."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    tensors = {name: value.numpy().tobytes() for name, value in load_file(newest / "tensors.safetensors").items()}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics]
    return tensors, metrics, (folder / "rollouts.jsonl").read_text(), (folder / "tokens.jsonl").read_text()


@pytest.mark.parametrize("recipe", ["solid", "grpo"])
def test_killed_twice_and_resumed(tmp_path, rows, recipe):
    finished(command(tmp_path / "whole", rows, recipe))
    broken = tmp_path / "broken"
    killed_after(command(broken, rows, recipe), broken, lines=4)
    killed_after([*KEEL, "train", "--resume", str(broken)], broken, lines=10)
    finished([*KEEL, "train", "--resume", str(broken)])
    for whole, resumed in zip(told(tmp_path / "whole"), told(broken), strict=True):
        assert resumed == whole
    assert len(told(broken)[1]) == STEPS + 1
    steps = [json.loads(line)["step"] for line in told(broken)[3].splitlines()]
    assert steps == [1] * 4 + [2] * 4 + [5] * 4 + [6] * 4 + [9] * 4 + [10] * 4 + [13] * 4 + [14] * 4  # every other batch of two
