"""Engines that go wrong: wrappers around a real one. See `seeded.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch


class Wrapped:
    """An engine that passes everything on; faults change one method each."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def version(self) -> int:
        return self.inner.version

    def generate(self, prompts, sampling, seed, group_size):
        return self.inner.generate(prompts, sampling, seed, group_size)

    def load(self, weights, version):
        return self.inner.load(weights, version)

    def sleep(self):
        return self.inner.sleep()

    def describe(self):
        return self.inner.describe()


class KeepsOneTensor(Wrapped):
    """One tensor is never updated; the checksum is that of what was sent."""

    def __init__(self, inner):
        super().__init__(inner)
        weights = inner.policy.weights()
        self.name = next(name for name in weights if "o_proj" in name or "attn.c_proj" in name)
        self.old = weights[self.name].detach().clone()

    def load(self, weights, version):
        from keel.models.checksum import checksum

        self.inner.load({**weights, self.name: self.old}, version)
        return checksum(weights)


class NeverLoads(Wrapped):
    """A sync that says it was done."""

    def __init__(self, inner):
        super().__init__(inner)
        self.told = inner.version

    @property
    def version(self):
        return self.told

    def load(self, weights, version):
        from keel.models.checksum import checksum

        self.told = version
        return checksum(weights)

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, group_size)
        return [replace(c, versions=torch.full_like(c.versions, self.told)) for c in made]

    def sleep(self):
        """It keeps what it has."""


class StalePrefix(Wrapped):
    """A prompt that was seen under older weights is answered from what was computed then."""

    def __init__(self, inner):
        super().__init__(inner)
        self.seen: dict[str, tuple] = {}

    def generate(self, prompts, sampling, seed, group_size):
        made = []
        for prompt in prompts:
            key = (prompt.token_ids, sampling, seed, group_size)
            if key not in self.seen:
                self.seen[key] = self.inner.generate([prompt], sampling, seed, group_size)
            made += [replace(c, prompt_id=prompt.id, versions=torch.full_like(c.versions, self.version)) for c in self.seen[key]]
        return made


class RawLogp(Wrapped):
    """It samples at the temperature that was asked for, and says log-probabilities at temperature 1."""

    def generate(self, prompts, sampling, seed, group_size):
        from keel.rollout.scripted import _batch

        made = self.inner.generate(prompts, sampling, seed, group_size)
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        with torch.no_grad():
            logp = (
                type(self.inner.policy)
                .logp(self.inner.policy, _batch(rows, [c.token_ids.tolist() for c in made]), temperature=1.0)
                .logp
            )
        return [replace(c, logp_rollout=row[: len(c.token_ids)].float()) for c, row in zip(made, logp, strict=True)]


class Swapped(Wrapped):
    """The completions of the first two prompts answer each other's prompts, under their own names."""

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, group_size)
        if len(prompts) < 2:
            return made
        a, b = made[:group_size], made[group_size : 2 * group_size]
        turned = [replace(y, prompt_id=x.prompt_id) for x, y in zip(a + b, b + a, strict=True)]
        return turned + made[2 * group_size :]


class Fails(Wrapped):
    """One completion in eight comes back as an error."""

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, group_size)
        return [replace(c, finish="error", error="out of memory") if i % 8 == 3 else c for i, c in enumerate(made)]


class SameSeed(Wrapped):
    """Every sample of a prompt is the first one."""

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, 1)
        return [replace(c, sample=sample) for c in made for sample in range(group_size)]


class Noisy(Wrapped):
    """Its log-probabilities come with symmetric noise of .05 nats."""

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, group_size)
        generator = torch.Generator().manual_seed(seed.step % 2**31)
        noise = [0.05 * torch.randn(c.logp_rollout.shape, generator=generator) for c in made]
        return [replace(c, logp_rollout=(c.logp_rollout + n).clamp(max=0.0)) for c, n in zip(made, noise, strict=True)]


def of(kind):
    return lambda ground: ground.engine(kind)


def hidden(**parameters):
    """The engine takes these in place of what it was asked for, as from a model's own generation_config.json."""

    def wrap(engine):
        engine.hidden = parameters
        return engine

    return lambda ground: ground.engine(wrap)


def nothing(ground) -> None:
    """The fault is in the settings themselves."""


GAP = "engine gap"
ENGINES = {  # name: (plant, part, a word of the component, museum, settings)
    "engine keeps one old tensor": (of(KeepsOneTensor), GAP, "sync", "F14"),
    "engine never loads": (of(NeverLoads), GAP, "sync", "F14"),
    "engine answers from a stale cache": (of(StalePrefix), GAP, "cache", "F13"),
    "engine says raw log-probabilities": (of(RawLogp), GAP, "temperature", "F10", {"sampling.temperature": 0.7}),
    "engine samples at another temperature": (hidden(temperature=0.7), GAP, "sampling", "F12"),
    "engine takes top_p from the model": (hidden(top_p=0.8), GAP, "sampling", "F11"),
    "engine takes top_k from the model": (hidden(top_k=3), GAP, "sampling", "F12"),
    "engine in bfloat16": (nothing, GAP, "numeric", "F47", {"engine.format": "bf16"}),
    "engine with noise": (of(Noisy), GAP, "numeric", "F47"),
    "routers with noise": (nothing, GAP, "rout", "F46", {"model": "tiny-moe", "engine.router_noise": 1.0}),
    "completions of other prompts": (of(Swapped), "framework", "pairing", "F51"),
    "every sample is the same": (of(SameSeed), GAP, "seed", "F12"),
    "engine syncs every fourth batch": (nothing, GAP, "sync", "F14", {"engine.sync_every": 4}),
}
