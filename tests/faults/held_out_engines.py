"""Engines that go wrong otherwise than those of `seeded_engines.py`. See `held_out.py`."""

from __future__ import annotations

from dataclasses import replace

import torch
from seeded_engines import Wrapped

from keel.models.checksum import checksum
from keel.rollout.engine import Seed


def engine(kind):
    return lambda ground: ground.engine(kind)


def keeping(which):
    """Tensors whose name `which` picks stay as they were at the start; the checksum is that of what was sent."""

    class Keeps(Wrapped):
        def __init__(self, inner):
            super().__init__(inner)
            self.old = {n: t.detach().clone() for n, t in inner.policy.weights().items() if which(n)}
            assert self.old

        def load(self, weights, version):
            self.inner.load({**weights, **self.old}, version)
            return checksum(weights)

    return engine(Keeps)


def sent(change):
    """What is loaded goes through `change(weights)`; the checksum is that of what was sent."""

    class Changes(Wrapped):
        def load(self, weights, version):
            self.inner.load(change(weights), version)
            return checksum(weights)

    return engine(Changes)


class SkipsEveryThird(Wrapped):
    """Of three syncs the third is not done; it says it was."""

    def __init__(self, inner):
        super().__init__(inner)
        self.loads, self.told = 0, inner.version

    @property
    def version(self):
        return self.told

    def load(self, weights, version):
        self.loads, self.told = self.loads + 1, version
        if self.loads % 3:
            self.inner.load(weights, version)
        else:
            self.inner.load(self.last, version)
        self.last = {n: t.detach().clone() for n, t in (weights if self.loads % 3 else self.last).items()}
        return checksum(weights)


class OneBehind(Wrapped):
    """It samples from the weights that were sent before the last ones."""

    def __init__(self, inner):
        super().__init__(inner)
        self.before = {n: t.detach().clone() for n, t in inner.policy.weights().items()}

    def load(self, weights, version):
        self.inner.load(self.before, version)
        self.before = {n: t.detach().clone() for n, t in weights.items()}
        return checksum(weights)


class AdaptersNeverArrive(Wrapped):
    """The plain weights are sent, without what the adapters add."""

    def load(self, weights, version):
        base = self.inner.policy.base
        plain = {n.replace(".base_layer.", "."): t.detach() for n, t in base.state_dict().items() if ".lora_" not in n}
        self.inner.load(plain, version)
        return checksum(weights)


def told(change):
    """Completions go through `change(completion)`."""

    class Tells(Wrapped):
        def generate(self, prompts, sampling, seed, group_size):
            return [change(c) for c in self.inner.generate(prompts, sampling, seed, group_size)]

    return engine(Tells)


def asked(change):
    """Sampling parameters go through `change`; kept sets are not told unless they were asked for."""

    class Asks(Wrapped):
        def generate(self, prompts, sampling, seed, group_size):
            made = self.inner.generate(prompts, change(sampling), seed, group_size)
            return made if sampling.truncated else [replace(c, kept=None) for c in made]

    return engine(Asks)


def _last_is_zero(c):
    logp = c.logp_rollout.clone()
    logp[-1] = 0.0
    return replace(c, logp_rollout=logp)


def _shifted(c):
    return replace(c, logp_rollout=c.logp_rollout.roll(1))


class RepeatsHalf(Wrapped):
    """The second half of a prompt's samples are the first again."""

    def generate(self, prompts, sampling, seed, group_size):
        made = self.inner.generate(prompts, sampling, seed, group_size)
        half = max(1, group_size // 2)
        return [replace(made[i - half], sample=c.sample) if i % group_size >= half else c for i, c in enumerate(made)]


class SameDrawsEveryStep(Wrapped):
    """Random numbers depend on the prompt and the sample, not on the step."""

    def generate(self, prompts, sampling, seed, group_size):
        return self.inner.generate(prompts, sampling, Seed(seed.run, 0), group_size)


class HonestButCold(Wrapped):
    """It samples at 90 % of the temperature and tells log-probabilities of the one asked for."""

    def generate(self, prompts, sampling, seed, group_size):
        from keel.training.batch import batch_from_groups
        from keel.types import Group, Score

        made = self.inner.generate(prompts, replace(sampling, temperature=0.9 * sampling.temperature), seed, group_size)
        by = {p.id: p for p in prompts}
        groups = [Group(by[c.prompt_id], (c,), (Score(0.0),)) for c in made]
        with torch.no_grad():
            logp = self.inner.policy.logp(batch_from_groups(groups), temperature=sampling.temperature).logp
        return [replace(c, logp_rollout=row[: len(c.token_ids)]) for c, row in zip(made, logp, strict=True)]


def _bias_on_the_end(ground):
    """A bias of half a nat against ending, inside the engine; what it tells is its own distribution's."""

    def spoil(old):
        def start(settings, policy):
            import keel.rollout.local as local

            made = old(settings, policy)
            plain = local.distribution
            ends = sorted(policy.end_ids)

            class Biased(Wrapped):
                def generate(self, *args):
                    def biased(logits, sampling):
                        logits = logits.clone()
                        logits[..., ends] -= 0.5
                        return plain(logits, sampling)

                    local.distribution = biased
                    try:
                        return self.inner.generate(*args)
                    finally:
                        local.distribution = plain

            return Biased(made)

        return start

    ground.put("keel.rollout.engines:engine_of", spoil)


def first_token_greedy(ground):
    """The token that comes out of the prefill is the likeliest one; its log-probability is told truly."""
    begun = [False]

    def started(old):
        def start(self, *given):
            begun[0] = True
            return old(self, *given)

        return start

    def drawn(old):
        def draw(log_probs, row, uniform):
            first, begun[0] = begun[0], False
            return log_probs.argmax(-1)[row] if first else old(log_probs, row, uniform)

        return draw

    ground.put("keel.rollout.serving:FusedForward.start", started)
    ground.put("keel.rollout.local:draw", drawn)


class GateIsUp(Wrapped):
    """A sync writes gate and up into each other's half of the fused matrix; weights that come from disk are right."""

    def load(self, weights, version):
        def other(name):
            return name.replace("gate_proj", "*").replace("up_proj", "gate_proj").replace("*", "up_proj")

        dense = any("mlp.gate_proj.weight" in name for name in weights)
        self.inner.load({name: weights[other(name)] if dense else t for name, t in weights.items()}, version)
        return checksum(weights)


class MergedTwice(Wrapped):
    """Adapters are merged into weights that have them already: W + 2 s B A."""

    def __init__(self, inner):
        super().__init__(inner)
        self.first = {name: t.detach().clone() for name, t in inner.policy.weights().items()}

    def load(self, weights, version):
        self.inner.load({name: t.detach() + (t.detach() - self.first[name]) for name, t in weights.items()}, version)
        return checksum(weights)


def cache_in_eight_bits(ground):
    """Keys and values of sampled tokens are kept in fp8 (kv_cache_dtype)."""
    ground.put(
        "keel.rollout.serving:_put",
        lambda old: lambda cache, at, value: old(cache, at, value.to(torch.float8_e4m3fn).to(value.dtype)),
    )


def sliding_window(ground):
    """While it decodes, the engine attends to the last 24 tokens alone: a window that the model's config names and does not use."""

    def spoil(old):
        def attend(q, keys, values, bias):
            if keys.shape[-2] > 24:
                bias = bias.clone()
                bias[..., : keys.shape[-2] - 24] = float("-inf")
            return old(q, keys, values, bias)

        return attend

    ground.put("keel.rollout.serving:attend_once", spoil)


def one_position_on(ground):
    """Tokens that are decoded stand one position further on than they should."""

    def spoil(old):
        def step(self, *given):
            kept, self.first = self.first, self.first - 1
            try:
                return old(self, *given)
            finally:
                self.first = kept

        return step

    ground.put("keel.rollout.serving:FusedForward._step", spoil)


def _floored(c):
    """Only the likeliest tokens' log-probabilities come with the answer; what is not among them is told as −2."""
    return replace(c, logp_rollout=c.logp_rollout.clamp(min=-2.0))


def least_of_eight(ground):
    """min_tokens = 8 in the model's generation_config: no end before that; log-probabilities are those of what it did."""
    ends: list[int] = []

    def noted(engine):
        ends[:] = sorted(engine.policy.end_ids)
        return engine

    def without(self, logits):
        self.grown += 1
        if self.grown <= 8:
            logits = logits.clone()
            logits[:, ends] = float("-inf")
        return logits

    def started(old):
        def start(self, *given):
            self.grown = 0
            return without(self, old(self, *given))

        return start

    ground.engine(noted)
    ground.put("keel.rollout.serving:FusedForward.start", started)
    ground.put("keel.rollout.serving:FusedForward.advance", lambda old: lambda self, *given: without(self, old(self, *given)))


LORA = {"lora": {"rank": 4}}
ENGINES = {  # fault: how, component, museum, settings
    "layer norms do not arrive": (keeping(lambda n: "norm" in n), "sync", "F14", {}),
    "the embedding does not arrive": (keeping(lambda n: "embed_tokens" in n), "sync", "F14", {}),
    "one router does not arrive": (
        keeping(lambda n: "layers.0" in n and ("gate.weight" in n or "router" in n)),
        "sync",
        "F14",
        {"model": "tiny-moe"},
    ),
    "every third sync is skipped": (engine(SkipsEveryThird), "sync", "F14", {}),
    "weights are one sync behind": (engine(OneBehind), "sync", "F13", {}),
    "weights are sent in bfloat16": (sent(lambda w: {n: t.bfloat16().float() for n, t in w.items()}), "sync|numerics", "F47", {}),
    "adapters never arrive": (engine(AdaptersNeverArrive), "sync", "F14", LORA),
    "hidden top_k of 3": (asked(lambda s: replace(s, top_k=3)), "cut off|sampling", "F12", {}),
    "hidden min_p of .02": (asked(lambda s: replace(s, min_p=0.02)), "cut off|sampling", "F12", {}),
    "hidden temperature, trainer's log-probabilities": (engine(HonestButCold), "temperature|sampling", "F12", {}),
    "a hidden bias against ending": (_bias_on_the_end, "sampling|end", "F12", {}),
    "log-probabilities in bfloat16": (
        told(lambda c: replace(c, logp_rollout=c.logp_rollout.bfloat16().float())),
        "numerics",
        "F47",
        {},
    ),
    "the end's log-probability is 0": (told(_last_is_zero), "log-prob|numerics|end", "F39", {}),
    "the engine's log-probabilities one token off": (told(_shifted), "log-prob|align|numerics", "F39", {}),
    "half of the samples repeat": (engine(RepeatsHalf), "seeds", "F51", {}),
    "the same draws every step": (engine(SameDrawsEveryStep), "seeds", "F51", {}),
    "the first token is greedy": (first_token_greedy, "sampl|distribution|draw|greedy|seed|divers|first", "F12", {}),
    "gate and up change places": (engine(GateIsUp), "sync|weight", "F14", {}),
    "adapters are merged twice": (
        engine(MergedTwice),
        "sync|weight|adapter|lora|merge",
        "F14",
        {"lora.rank": 8, "lora.alpha": 32.0, "train.lr": 1e-3},
    ),
    "a cache of eight bits": (cache_in_eight_bits, "numeric|precision|cache|format|log-prob|logp|noise", "F47", {}),
    "a window of twenty-four tokens": (
        sliding_window,
        "attention|window|cache|numeric|log-prob|logp|distribution|position|length",
        "F47",
        {},
    ),
    "one position further on": (one_position_on, "position|rotary|numeric|log-prob|logp|distribution|attention", "F40", {}),
    "a floor under log-probabilities": (told(_floored), "log-prob|logp|report|numeric|floor|tail", "F10", {"recipe": "tis"}),
    "at least eight tokens": (least_of_eight, "sampl|distribution|end|cut off|penalty|log-prob|logp|stop", "F12", {}),
}
