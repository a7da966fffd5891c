"""Which experts a mixture's tokens go to: heard, and led.

Every router in transformers maps hidden states to (logits, weights, indices). A hook on it can note what it chose, and can put
other experts in place, with weights computed anew from the same logits, so that the router keeps its gradient. Hooks stand only
while a forward pass runs, or while backward computes a part of it again.

−1 in a table of experts means "unknown": there the router chooses by itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.errors import KeelError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how configurations name the number of experts
UNKNOWN = -1


@dataclass(frozen=True)
class Routing:
    """Sizes of a mixture of experts: how many layers choose, among how many experts, how many of them for each token."""

    layers: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Rule:
    """How a router makes weights of its logits, once experts are chosen.

    Args:
        scores: "softmax" or "sigmoid" of the logits.
        normalise: whether a token's weights are made to sum to 1.
        scale: they are multiplied by it.
    """

    scores: str
    normalise: bool
    scale: float = 1.0

    def __call__(self, logits: Float[Tensor, "N experts"], index: Int[Tensor, "N k"]) -> Float[Tensor, "N k"]:
        """Weights of these experts, in fp32.

        Source: Stabilizing RL with LLMs, arXiv 2512.01374 (routing replay); the arithmetic is each architecture's own.
        """
        logits = logits.float()
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        weight = scores.gather(-1, index)
        if self.normalise:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * self.scale


class Heard:
    """What routers chose in one forward pass, by layer."""

    def __init__(self, layers: int):
        self.chosen: list[Tensor | None] = [None] * layers

    def table(self) -> Int[Tensor, "N layers k"]:
        """Experts that every token would have gone to by itself, in the model's own order of tokens."""
        return torch.stack([index for index in self.chosen if index is not None], 1)


class _Hooks:
    """Hooks on all routers while inside; can be entered again and again.

    Args:
        experts: [N, layers, k] to put in place, or None.
        heard: where to note what was chosen, or None.
    """

    def __init__(self, routers: Sequence[nn.Module], rule: Rule, experts: Tensor | None, heard: Heard | None):
        self.routers, self.rule, self.experts, self.heard = routers, rule, experts, heard

    def __enter__(self) -> None:
        self.handles = [
            router.register_forward_hook(functools.partial(self._hook, depth)) for depth, router in enumerate(self.routers)
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, depth: int, router: nn.Module, given: tuple, output: tuple[Tensor, Tensor, Tensor]):
        logits, weight, own = output
        if self.heard is not None:
            self.heard.chosen[depth] = own.detach()
        if self.experts is None:
            return None
        index = followed(own, self.experts[:, depth])
        return logits, self.rule(logits, index).to(weight.dtype), index


def followed(own: Int[Tensor, "N k"], chosen: Int[Tensor, "N k"]) -> Int[Tensor, "N k"]:
    """The experts that were recorded, and a token's own where they are unknown."""
    return torch.where(chosen < 0, own, chosen.to(own.dtype))


class Routers:
    """The routers of a transformers model, in the order of its layers.

    Args:
        model: that they belong to.
        modules: each maps hidden states [N, d] to (logits, weights, indices).
        rule: how they weigh.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], rule: Rule):
        self.model, self.modules, self.rule = model, modules, rule
        self.shape = Routing(len(modules), int(modules[0].num_experts), int(modules[0].top_k))

    @classmethod
    def of(cls, model: nn.Module) -> Routers | None:
        """The routers of a model; None where it has none, or none whose weights a known rule computes (measured on a probe)."""
        modules = [m for m in model.modules() if re.search(r"Top[kK]Router$", type(m).__name__)]
        sizes = {(getattr(m, "num_experts", None), getattr(m, "top_k", None)) for m in modules}
        if len(sizes) != 1 or None in next(iter(sizes)):
            return None
        rules = {_measured_rule(module) for module in modules}
        rule = rules.pop()
        return None if rules or rule is None else cls(model, modules, rule)

    @contextmanager
    def led(self, experts: Int[Tensor, "N layers k"] | None = None) -> Iterator[Heard]:
        """While inside, note what every router chooses by itself; with `experts`, send tokens there instead.

        N are the tokens of one forward pass, rows after one another, padding included (−1, or anything). What gradient
        checkpointing computes again in backward is led as the first time.

        Raises:
            KeelError: a layer is checkpointed in a way that cannot be led again.
        """
        heard = Heard(self.shape.layers)
        again = functools.partial(_Hooks, self.modules, self.rule, experts, None)
        layers = _checkpointed(self.model) if experts is not None and torch.is_grad_enabled() else []
        before = [layer._gradient_checkpointing_func for layer in layers]
        led_again = [_with_context(func, again) for func in before]
        try:
            for layer, func in zip(layers, led_again, strict=True):
                layer._gradient_checkpointing_func = func
            with _Hooks(self.modules, self.rule, experts, heard):
                yield heard
        finally:
            for layer, func in zip(layers, before, strict=True):
                layer._gradient_checkpointing_func = func


@torch.no_grad()
def _measured_rule(router: nn.Module, tokens: int = 16) -> Rule | None:
    """The rule that computes this router's own weights from its logits on random hidden states; None if none does."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    noise = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    told = router((3.0 * noise).to(weight))
    if not isinstance(told, tuple) or len(told) != 3 or told[0].shape != (tokens, weight.shape[0]):
        return None
    logits, weights, index = told
    likely = "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    by_likelihood = [likely, *({"softmax", "sigmoid"} - {likely})]
    normalises = bool(getattr(router, "norm_topk_prob", True))
    rules = [Rule(scores, on, scale) for on in (normalises, not normalises) for scores in by_likelihood]
    near = 8 * torch.finfo(weights.dtype).eps
    return next((rule for rule in rules if torch.allclose(rule(logits, index), weights.float(), rtol=near, atol=near / 8)), None)


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    return [m for m in on if hasattr(m, "_gradient_checkpointing_func")]


def _with_context(func, again):
    """The same checkpointing, whose second computation is led as the first was."""
    known = isinstance(func, functools.partial) and func.func is checkpoint
    if not known or func.keywords.get("use_reentrant") is not False or "context_fn" in func.keywords:
        raise KeelError(
            "Gradient checkpointing is on in a form that routing replay cannot follow: what is computed again in backward would "
            "choose other experts than the first time. Expected torch's own, with use_reentrant = False and no context_fn of "
            "its own. Call model.activation_checkpointing_enable() without arguments, or set train.routing_replay = none."
        )
    return functools.partial(func, context_fn=lambda: (nullcontext(), again()))


def is_mixture(config) -> bool:
    """Whether a configuration speaks of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in COUNTS)


def check_replayable(name: str, config, routing: Routing | None) -> None:
    """Refuse routing replay where it could only be ignored.

    Args:
        name: of the model.
        routing: what keel can replay of it; None is nothing.

    Raises:
        KeelError: the model is dense, or a mixture whose routers keel cannot lead.
    """
    if routing is not None:
        return
    if is_mixture(config):
        raise KeelError(
            f"Routing was to be replayed, and {name!r} ({config.model_type}) is a mixture of experts whose routers keel cannot "
            "lead. Expected routers that return logits, weights and experts, as those of Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, "
            "DeepSeek-V2 and DeepSeek-V3 do. Set train.routing_replay = none, or take such a model."
        )
    raise KeelError(
        f"Routing was to be replayed, and {name!r} ({config.model_type}) is dense: it has no experts. Expected a mixture of "
        "experts, for instance tiny-moe; or train.routing_replay = none."
    )


def check_recorded(experts: Int[Tensor, "B L layers k"] | None, routing: Routing | None) -> None:
    """Refuse an engine's record of where tokens went that does not fit the model.

    Raises:
        KeelError: there is none, or it speaks of other layers or experts than the model has.
    """
    if experts is None or routing is None:
        raise KeelError(
            "train.routing_replay is R3, and the engine did not say which experts its tokens went to. Expected a record of every "
            "token but a completion's last. Take engine.name = local, or replay the trainer's own (R2)."
        )
    layers, top_k = experts.shape[2:]
    if (layers, top_k) != (routing.layers, routing.top_k) or int(experts.max()) >= routing.experts:
        raise KeelError(
            f"The engine recorded {top_k} experts in each of {layers} layers, the highest number {int(experts.max())}. Expected "
            f"{routing.top_k} of {routing.experts} in each of {routing.layers} layers: it serves another model."
        )
