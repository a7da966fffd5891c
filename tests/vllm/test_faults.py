"""What can go wrong between keel and vLLM, done on purpose; each is named within one batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.connection import wait

import pytest
import torch

from keel.errors import KeelError
from keel.models.load import load_policy
from keel.rollout import vllm_engine
from keel.rollout.engine import Seed
from keel.types import Sampling

from .test_laws import long_prompts, nudge, prompts

on_tiny = pytest.mark.parametrize("shared", ["tiny-dense"], indirect=True)
SEED, SHORT = Seed(0, 0), Sampling(max_completion_tokens=8)


@on_tiny
def test_a_tensor_that_is_not_handed_over_is_named_and_the_old_weights_stay(engine):
    weights = dict(engine.policy.weights())
    weights.pop("model.norm.weight")
    with pytest.raises(KeelError, match=r"'model\.norm\.weight' did not arrive.*keeps version 0"):
        engine.load(weights, 1)
    assert engine.version == 0 and engine.generate(prompts(engine.policy), SHORT, SEED, 1)


@on_tiny
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_a_tensor_lost_on_the_way_is_named_and_a_whole_sync_mends_it(engine, monkeypatch, name):
    stage = engine._stage
    monkeypatch.setattr(engine, "_stage", lambda sent, path: stage({k: v for k, v in sent.items() if k != name}, path))
    nudge(engine.policy)
    with pytest.raises(KeelError, match=f"version 1: tensor '{name}' was sent but did not arrive"):
        engine.load(engine.policy.weights(), 1)
    with pytest.raises(KeelError, match="sleeps"):
        engine.generate(prompts(engine.policy), SHORT, SEED, 1)
    monkeypatch.undo()
    engine.load(engine.policy.weights(), 1)
    assert engine.generate(prompts(engine.policy), SHORT, SEED, 1)


@on_tiny
def test_a_tensor_changed_on_the_way_is_named(engine, monkeypatch):
    stage = engine._stage

    def flip(sent, path):
        changed = sent["model.norm.weight"].clone()
        changed[3] += 1e-6
        stage({**sent, "model.norm.weight": changed}, path)

    monkeypatch.setattr(engine, "_stage", flip)
    with pytest.raises(KeelError, match="tensor 'model.norm.weight' was sent as .* and arrived as"):
        engine.load(engine.policy.weights(), 1)


@on_tiny
def test_a_prefix_cache_of_older_weights_is_found_by_the_probe(engine, monkeypatch):
    engine.load(engine.policy.weights(), 0)  # the probe's own prompts are in the cache now
    monkeypatch.setattr(engine, "_reset_prefix_cache", lambda: True)
    nudge(engine.policy)
    with pytest.raises(KeelError, match="keeps a prefix cache of older ones"):
        engine.load(engine.policy.weights(), 1)


@on_tiny
def test_a_prefix_cache_that_cannot_be_emptied_is_named(engine, monkeypatch):
    monkeypatch.setattr(engine, "_reset_prefix_cache", lambda: False)
    with pytest.raises(KeelError, match="did not empty its prefix cache"):
        engine.load(engine.policy.weights(), 1)


# ---- faults that an engine does not survive --------------------------------------------------------------------------


@pytest.fixture
def tiny():
    return load_policy("tiny-dense")


def test_raw_log_probabilities_are_refused_at_the_start(tiny, start, monkeypatch):
    fields = vllm_engine.engine_fields
    raw = {"logprobs_mode": "raw_logprobs"}
    monkeypatch.setattr(vllm_engine, "engine_fields", lambda *given: fields(*given) | raw)
    with pytest.raises(KeelError, match=r"It returns \*raw\* log-probabilities"):
        start(tiny)


def test_an_engine_that_dies_in_the_middle_of_a_batch_is_named(tiny, start):
    engine = start(tiny)
    threading.Timer(0.3, lambda: os.kill(engine.processes[0].pid, signal.SIGKILL)).start()
    begin = time.perf_counter()
    with pytest.raises(KeelError, match="vLLM stopped: it failed while sampling 8192 completions"):
        engine.generate(long_prompts(tiny, 64), Sampling(max_completion_tokens=64), SEED, 128)
    assert time.perf_counter() - begin < 60
    with pytest.raises(KeelError, match="cannot go on with taking new weights: it failed"):
        engine.load(tiny.weights(), 1)


def test_an_engine_that_hangs_is_named_in_time_and_ended(tiny, start):
    engine = start(tiny)
    object.__setattr__(engine, "settings", engine.settings.model_copy(update={"timeout_s": 3.0}))
    processes = list(engine.processes)
    os.kill(processes[0].pid, signal.SIGSTOP)
    begin = time.perf_counter()
    with pytest.raises(KeelError, match="gave no answer within 3 s while sampling 4 completions"):
        engine.generate(prompts(tiny), SHORT, SEED, 1)
    assert time.perf_counter() - begin < 30
    assert all(wait([process.sentinel], 0) for process in processes)


@on_tiny
def test_ctrl_c_does_not_reach_it(engine):
    worker = engine.processes[0].pid
    os.kill(worker, signal.SIGINT)
    assert len(engine.generate(prompts(engine.policy), SHORT, SEED, 1)) == 4
    assert torch.isfinite(torch.tensor(engine.gap))
