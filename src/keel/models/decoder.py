"""A compact Llama / Qwen decoder over forests of tokens, on the very modules of the transformers model.

It holds no weights: every matrix belongs to the transformers model (LoRA layers included), so training through it
trains that model. Dense Llama, Mistral, Qwen2, Qwen3 and the Qwen3 mixture of experts run here; every other architecture runs
through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.models.linear import apply_gated, apply_linear, fast_products, regular
from keel.models.packing import Packing
from keel.models.routing import UNKNOWN, Routing, followed
from keel.models.sharding import within

RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, read from a transformers configuration."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @classmethod
    def of(cls, config) -> Shape:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps)


def supports(config) -> bool:
    """Whether this decoder computes the architecture exactly: a known family, SiLU, full attention and plain rotary positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "use_sliding_window", config.model_type == "mistral") and getattr(config, "sliding_window", None)
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not window
        and getattr(config, "decoder_sparse_step", 1) == 1
        and not getattr(config, "mlp_only_layers", None)
    )


def rotary(positions: Int[Tensor, " N"], inv_freq: Float[Tensor, " half"], dtype: torch.dtype):
    """cos and sin [N, 1, head_dim] of each position, computed in fp32 as transformers does."""
    angle = positions.to(inv_freq.dtype)[:, None] * inv_freq
    angle = torch.cat((angle, angle), -1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Float[Tensor, "N heads hd"], cos: Tensor, sin: Tensor) -> Float[Tensor, "N heads hd"]:
    """Rotary position embedding of queries or keys. Source: RoFormer, arXiv 2104.09864; halves paired as in Llama."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def forest_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Float[Tensor, "N width"]:
    """Causal attention of every node over its own path: gathered into leaf rows, computed there, read back once per node."""
    rows, width = packing.leaves.shape

    def gather(x: Tensor) -> Tensor:
        return x.index_select(0, packing.leaves.flatten()).view(rows, width, *x.shape[1:]).transpose(1, 2)

    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(gather(q), gather(k), gather(v), is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(rows * width, -1).index_select(0, packing.place)


@dataclass(frozen=True)
class Router:
    """How tokens choose experts: by softmax over router logits, the `top_k` likeliest, weights made to sum to 1 if `normalise`."""

    top_k: int
    normalise: bool

    @classmethod
    def of(cls, config) -> Router | None:
        """The router of a mixture of experts; None for a dense model."""
        return cls(config.num_experts_per_tok, config.norm_topk_prob) if config.model_type.endswith("moe") else None

    def __call__(self, logits: Float[Tensor, "N experts"], chosen: Int[Tensor, "N k"] | None = None):
        """Weights [N, k] and indices [N, k] of the experts that each token goes to, and those [N, k] that it would choose itself.

        With `chosen` given, those experts are taken (−1: the token's own), and their weights computed anew from the logits, so
        that the router learns.

        Source: Stabilizing RL with LLMs, arXiv 2512.01374 (routing replay).
        """
        probs = logits.softmax(-1, dtype=torch.float32)
        own = probs.topk(self.top_k, -1).indices
        index = own if chosen is None else followed(own, chosen)
        weight = probs.gather(-1, index)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight.to(logits.dtype), index, own


def mixture(
    gate_up: Float[Tensor, "experts wide d"],
    down: Float[Tensor, "experts d half"],
    x: Float[Tensor, "N d"],
    weight: Float[Tensor, "N k"],
    index: Int[Tensor, "N k"],
) -> Float[Tensor, "N d"]:
    """Weighted sum of each token's experts. Tokens are sorted by expert, so that each expert is one product over its own tokens."""
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    token = order // index.shape[1]
    sizes = torch.bincount(flat, minlength=len(gate_up)).tolist()
    parts = []
    for expert, part in enumerate(x.index_select(0, token).split(sizes)):
        gate, up = F.linear(part, gate_up[expert]).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up, down[expert]))
    mixed = torch.cat(parts) * weight.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, mixed.to(x.dtype))


class Decoder:
    """The trunk of a transformers causal model, run over a `Packing`.

    Args:
        model: a transformers model of a supported family (or a peft model's base model).
        recompute: keep only what goes into each layer, and compute the rest again in backward.
    """

    def __init__(self, model: nn.Module, recompute: bool = False):
        self.trunk, self.recompute = model.model, recompute
        self.shape, self.router = Shape.of(model.config), Router.of(model.config)
        experts = None if self.router is None else (self.shape.layers, model.config.num_experts, self.router.top_k)
        self.routing = None if experts is None else Routing(*experts)

    def hidden(self, packing: Packing, experts: Int[Tensor, "N layers k"] | None = None):
        """Final hidden states [N, d], after the last norm, and each node's own choice of experts [N, layers, k] (None if dense).

        Args:
            experts: to go to instead, where they are not −1.
        """
        nodes, packing = len(packing), self._filled(packing)
        if experts is not None:
            experts = F.pad(experts, (0, 0, 0, 0, 0, len(packing) - nodes), value=UNKNOWN)
        x = self.trunk.embed_tokens(packing.tokens)
        turn = rotary(packing.positions, self.trunk.rotary_emb.inv_freq.float(), x.dtype)
        chosen: list[Tensor] = []
        for depth, layer in enumerate(self.trunk.layers):
            x, own = within(layer, self._step, layer, x, turn, packing, None if experts is None else experts[:, depth])
            chosen += [] if own is None else [own]
        return self._norm(self.trunk.norm, x[:nodes]), torch.stack(chosen, 1)[:nodes] if chosen else None

    def _step(self, *given) -> tuple[Tensor, Tensor | None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, *given, **RECOMPUTED)
        return self._layer(*given)

    def _layer(self, layer: nn.Module, x: Tensor, turn, packing: Packing, experts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [N, d] after one layer, and each node's own choice of experts [N, k]; None if the layer is dense."""
        x = x + self._attention(layer, self._norm(layer.input_layernorm, x), turn, packing)
        normed = self._norm(layer.post_attention_layernorm, x)
        if self.router is None:
            gate, up = apply_linear(layer.mlp.gate_proj, normed), apply_linear(layer.mlp.up_proj, normed)
            return x + apply_gated(layer.mlp.down_proj, gate, up), None
        weight, index, own = self.router(F.linear(normed, layer.mlp.gate.weight), experts)
        return x + mixture(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, normed, weight, index), own

    def _filled(self, packing: Packing) -> Packing:
        """The forest with idle nodes at its end, where fast products want a regular number of rows; nothing reads them."""
        if not fast_products(self.trunk.embed_tokens.weight):
            return packing
        idle = (0, regular(len(packing)) - len(packing))
        filled = {name: F.pad(getattr(packing, name), idle) for name in ("tokens", "positions", "parent", "place")}
        return replace(packing, **filled)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(norm.weight.dtype), (x.shape[-1],), norm.weight, self.shape.eps)

    def _attention(self, layer: nn.Module, x: Tensor, turn, packing: Packing) -> Tensor:
        block, hd = layer.self_attn, self.shape.head_dim
        q, k, v = (apply_linear(proj, x).view(len(x), -1, hd) for proj in (block.q_proj, block.k_proj, block.v_proj))
        if hasattr(block, "q_norm"):
            q, k = self._norm(block.q_norm, q), self._norm(block.k_norm, k)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if fast_products(self.trunk.embed_tokens.weight):  # large: what it would keep is worth computing again
            return apply_linear(block.o_proj, checkpoint(forest_attention, q, k, v, packing, **RECOMPUTED))
        return apply_linear(block.o_proj, forest_attention(q, k, v, packing))
