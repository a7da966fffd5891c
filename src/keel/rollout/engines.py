"""Engines by name: what `engine.name` in a configuration means."""

from __future__ import annotations

from collections.abc import Callable

from keel.config import EngineSettings
from keel.errors import KeelError, nearest
from keel.models.policy import Policy
from keel.rollout.engine import Engine


def local(settings: EngineSettings, policy: Policy) -> Engine:
    """The in-process engine, in the arithmetic that is asked for."""
    from keel.rollout.local import LocalEngine
    from keel.rollout.numerics import Numerics

    hidden = {"temperature": settings.hidden_temperature, "top_p": settings.hidden_top_p}
    given = {name: value for name, value in hidden.items() if value is not None}
    numerics, eager = Numerics.of(settings), settings.eager_on(policy.device.type)
    return LocalEngine(policy, numerics=numerics, sync_every=settings.sync_every, hidden=given, eager=eager)


def vllm(settings: EngineSettings, policy: Policy) -> Engine:
    """vLLM, in processes of its own."""
    from keel.rollout.vllm_engine import VllmEngine

    return VllmEngine(policy, settings)


ENGINES: dict[str, Callable[[EngineSettings, Policy], Engine]] = {"local": local, "vllm": vllm}


def engine_of(settings: EngineSettings, policy: Policy) -> Engine:
    """The engine that the settings name, with the policy's weights loaded as version 0.

    Raises:
        KeelError: no such engine; the nearest name is given.
    """
    if settings.name not in ENGINES:
        hint = nearest(settings.name, ENGINES)
        raise KeelError(f"engine.name is {settings.name!r}; {hint}Expected one of: {', '.join(ENGINES)}.")
    return ENGINES[settings.name](settings, policy)
