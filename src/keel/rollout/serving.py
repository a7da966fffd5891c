"""How the local engine runs a model: one step of many branches at once, with their key–value caches.

Both forms answer the same three calls. `start(prompts)` gives logits after each prompt; `advance(parents, tokens)` grows branch i
from branch `parents[i]` of the last call by one token, and gives the logits after it. Several branches may grow from one parent
(siblings that drew different tokens), and a parent that nobody names is dropped. `finish()` frees the caches. Of a mixture of
experts they also say where tokens went:
`prompt_experts` after `start`, and `experts` of the branches' last tokens after `advance`; None where that cannot be heard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keel.models.decoder import Router, Shape, forest_attention, mixture, rotary, rotate
from keel.models.packing import pack
from keel.models.routing import Routers
from keel.rollout.capture import Captured, Record, padded_columns, padded_rows
from keel.rollout.numerics import EXACT, Numerics, RouterNoise, chunked_product, rounded

PREPACK_FROM = 2**16  # numbers in a matrix from which oneDNN's own layout pays on a CPU


class Linear:
    """y = x Wᵀ (+ b) for a weight that stands still: prepacked for oneDNN where that pays."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.bias = bias
        packs = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= PREPACK_FROM
        self.packed = packs and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class SplitLinear:
    """The same products in another order: each matrix by itself, and its sums in parts."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]):
        self.pieces = [(w.clone(), None if b is None else b.clone()) for w, b in zip(weights, biases, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([chunked_product(x, weight, bias) for weight, bias in self.pieces], -1)


class Head:
    """The output head in its own format; its logits are fp32, whatever they were computed in."""

    def __init__(self, weight: Tensor, numerics: Numerics):
        weight = rounded(weight, numerics.head)
        self.dtype = weight.dtype
        self.product = Linear(weight) if numerics.order == "fused" else SplitLinear([weight], [None])

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype)).float()


class _Layer:
    """One layer's own copy of its weights, with the products that share an input fused."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        depth: int,
        shape: Shape,
        router: Router | None,
        numerics: Numerics = EXACT,
        noise: RouterNoise | None = None,
    ):
        here = f"model.layers.{depth}"

        def own(name: str) -> Tensor | None:
            return weights[f"{here}.{name}"].clone() if f"{here}.{name}" in weights else None

        def join(block: str, names: Sequence[str]) -> Linear | SplitLinear:
            bias = [weights.get(f"{here}.{block}.{name}.bias") for name in names]
            matrices = [weights[f"{here}.{block}.{name}.weight"] for name in names]
            if numerics.order == "separate":
                return SplitLinear(matrices, bias)
            return Linear(torch.cat(matrices), None if bias[0] is None else torch.cat(bias))

        self.norm_in, self.norm_out = own("input_layernorm.weight"), own("post_attention_layernorm.weight")
        q_norm, k_norm = own("self_attn.q_norm.weight"), own("self_attn.k_norm.weight")
        both = None if q_norm is None else (q_norm.expand(shape.heads, -1), k_norm.expand(shape.kv_heads, -1))
        self.qk_norm = None if both is None else torch.cat(both)
        self.qkv, self.o = join("self_attn", ("q_proj", "k_proj", "v_proj")), join("self_attn", ("o_proj",))
        self.router, self.noise, self.split = router, noise, numerics.order == "separate"
        if router is None:
            self.gate_up, self.down = join("mlp", ("gate_proj", "up_proj")), join("mlp", ("down_proj",))
        else:
            self.gate = own("mlp.gate.weight")
            self.gate_up_proj, self.down_proj = own("mlp.experts.gate_up_proj"), own("mlp.experts.down_proj")

    def feed_forward(self, x: Tensor, mix: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
        """The layer's answer, and the experts that gave it, mixed by `mix`; None for a dense layer."""
        if self.router is None:
            gate, up = self.gate_up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up), None
        logits = chunked_product(x, self.gate) if self.split else F.linear(x, self.gate)
        weight, index, _ = self.router(logits if self.noise is None else self.noise(logits))
        return mix(self.gate_up_proj, self.down_proj, x, weight, index), index


class FusedForward:
    """The compact decoder for sampling: fused and prepacked products, and a static cache in which live branches stay contiguous.

    Prompts are aligned at their right ends, so that every branch writes the same cache column. A child takes over its parent's
    slot; only further siblings copy it.

    Args:
        numerics: in which arithmetic; the trainer's own unless given.
        noise: on router logits, where it is asked for.
        record: records a step of fixed shape, which is then launched as one (`Captured`); None = kernel by kernel.
    """

    def __init__(
        self,
        config,
        weights: Mapping[str, Tensor],
        inv_freq: Tensor,
        numerics: Numerics = EXACT,
        noise: RouterNoise | None = None,
        record: Record | None = None,
    ):
        self.shape, self.inv_freq, self.record = Shape.of(config), inv_freq.float(), record
        router, own = Router.of(config), numerics.weights(weights)
        self.embedding = own["model.embed_tokens.weight"].clone()
        self.layers = [_Layer(own, depth, self.shape, router, numerics, noise) for depth in range(self.shape.layers)]
        self.norm = own["model.norm.weight"].clone()
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])  # unrounded: the head's format is its own
        tied = own is weights and head.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
        self.head = Head(self.embedding if tied else head.clone(), numerics)

    def start(self, prompts: Sequence[Sequence[int]], branches: int, new_tokens: int) -> Tensor:
        """Logits [P, V] after each prompt; the cache holds up to `branches` branches of prompt + `new_tokens`."""
        lengths = torch.tensor([len(p) for p in prompts])
        width, device = int(lengths.max()), self.embedding.device
        table = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts], device=device)
        packing = pack(table, lengths.to(device))
        size, shape = max(branches, len(prompts)), self.shape
        self.cache = self.embedding.new_zeros(shape.layers, 2, size, shape.kv_heads, width + new_tokens, shape.head_dim)
        self.column, self.slot = width, np.arange(len(prompts))
        self.first = torch.zeros(size, dtype=torch.long, device=device)
        self.first[: len(prompts)] = (width - lengths).to(device)
        column = torch.arange(width + new_tokens, device=device)
        unseen = (column < self.first[:, None]) | (column >= width)  # a column is seen once something stands in it
        self.bias = self.embedding.new_zeros(unseen.shape).masked_fill(unseen, float("-inf"))
        self.at, self.token, self.back = (torch.zeros(n, dtype=torch.long, device=device) for n in (1, size, size))
        self.captured = None if self.record is None else Captured(self.record)
        source = (torch.arange(width) - (width - lengths)[:, None]).clamp(min=0).to(device)
        aligned = packing.node.gather(1, source)  # right-aligned; what stands left of a prompt is masked
        x, chosen = F.embedding(packing.tokens, self.embedding), []
        turn = rotary(packing.positions, self.inv_freq, x.dtype)
        for depth, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, turn)
            for half, value in ((0, k), (1, v)):
                self.cache[depth, half, : len(prompts), :, :width] = value[aligned].transpose(1, 2)
            x, index = self._finish(layer, x, forest_attention(q, k, v, packing), mixture)
            chosen.append(index)
        told = _table(chosen)
        self.experts, told = None, None if told is None else told.cpu()
        self.prompt_experts = None if told is None else [told[row[:n]] for row, n in zip(packing.node.cpu(), lengths, strict=True)]
        last = packing.node.gather(1, (lengths - 1).to(device)[:, None])[:, 0]
        return self.head(F.rms_norm(x[last], (x.shape[-1],), self.norm, self.shape.eps))

    def advance(self, parents: np.ndarray, tokens: Tensor) -> Tensor:
        """Logits [U, V] after one more token on each branch."""
        self._place(parents)
        live, columns = len(parents), self.column + 1
        self.token[:live] = tokens[torch.from_numpy(np.argsort(self.slot))]  # slots are a permutation of 0 … live − 1
        self.back.zero_()[:live] = torch.from_numpy(self.slot)
        self.bias[:, self.column] = 0.0
        if self.captured is None:
            logits, told = self._step(live, columns, self.column)
        else:
            size, room = self.bias.shape
            self.at.fill_(self.column)
            logits, told = self.captured(self._step, padded_rows(live, size), padded_columns(columns, room))
        self.column += 1
        self.experts = None if told is None else told[:live].cpu()
        return logits[:live]

    def _step(self, rows: int, columns: int, at: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [rows, V] after the tokens in the first slots, and where these went, in the order of `back`; their keys and values
        stand in column `at` (None: the one that the tensor of this name says), the last of `columns` that anybody sees.
        """
        at = self.at if at is None else at
        x, chosen = F.embedding(self.token[:rows], self.embedding), []
        turn = rotary(at - self.first[:rows], self.inv_freq, x.dtype)
        bias = self.bias[:rows, None, None, :columns]
        mix = mixture if self.captured is None else every_expert
        for depth, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, turn)
            keys, values = self.cache[depth, :, :rows, :, :columns]
            _put(keys, at, k), _put(values, at, v)
            q = q.view(rows, self.shape.kv_heads, -1, self.shape.head_dim)  # queries of one kv head, as if of one sequence
            x, index = self._finish(layer, x, attend_once(q, keys, values, bias).reshape(rows, -1), mix)
            chosen.append(index)
        back, told = self.back[:rows], _table(chosen)
        logits = self.head(F.rms_norm(x, (x.shape[-1],), self.norm, self.shape.eps).index_select(0, back))
        return logits, None if told is None else told.index_select(0, back)

    def finish(self) -> None:
        """Free the cache."""
        del self.captured, self.cache, self.bias, self.first, self.slot, self.token, self.back, self.at

    def _place(self, parents: np.ndarray) -> None:
        """Give every branch a slot below `len(parents)`, copying as few caches as there are new siblings and moved branches."""
        source = self.slot[parents]
        live = len(parents)
        _, eldest = np.unique(source, return_index=True)
        keeps = np.zeros(live, dtype=bool)
        keeps[eldest] = True
        keeps &= source < live
        slot = np.where(keeps, source, -1)
        holes = np.setdiff1d(np.arange(live), slot[keeps], assume_unique=True)
        slot[~keeps] = holes
        if len(holes):
            dst, src = torch.from_numpy(holes), torch.from_numpy(source[~keeps])
            self.cache[:, :, dst, :, : self.column] = self.cache[:, :, src, :, : self.column]
            self.first[dst], self.bias[dst] = self.first[src], self.bias[src]
        self.slot = slot

    def _qkv(self, layer: _Layer, x: Tensor, turn) -> tuple[Tensor, Tensor, Tensor]:
        shape, both = self.shape, self.shape.heads + self.shape.kv_heads
        normed = F.rms_norm(x, (x.shape[-1],), layer.norm_in, shape.eps)
        qkv = layer.qkv(normed).view(len(x), -1, shape.head_dim)
        qk = qkv[:, :both]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (shape.head_dim,), None, shape.eps) * layer.qk_norm
        qk = rotate(qk, *turn)
        return qk[:, : shape.heads], qk[:, shape.heads :], qkv[:, both:]

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor, mix: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
        x = x + layer.o(attended)
        out, chosen = layer.feed_forward(F.rms_norm(x, (x.shape[-1],), layer.norm_out, self.shape.eps), mix)
        return x + out, chosen


def _table(chosen: Sequence[Tensor | None]) -> Tensor | None:
    """Experts of all layers as [N, layers, k], small integers; None for a dense model."""
    heard = [index for index in chosen if index is not None]
    return torch.stack(heard, 1).to(torch.int16) if heard else None


def _put(cache: Tensor, at: int | Tensor, value: Tensor) -> None:
    """Write one column of a cache [rows, kv heads, columns, head_dim]: by its number, or by a tensor [1] that holds it."""
    if isinstance(at, int):
        cache[:, :, at] = value
    else:
        cache.index_copy_(2, at, value[:, :, None])


def every_expert(gate_up: Tensor, down: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """`mixture`, with every expert computing every token, and weight 0 for those not chosen: more products, and no shape that
    depends on where tokens go. A step of few tokens has to read all experts in any case.
    """
    share = torch.zeros(len(x), len(gate_up), dtype=weight.dtype, device=x.device).scatter(1, index, weight)
    gate, up = F.linear(x, gate_up.flatten(0, 1)).unflatten(1, gate_up.shape[:2]).chunk(2, -1)
    inner = F.silu(gate) * up * share[..., None]
    return torch.bmm(inner.transpose(0, 1), down.mT).sum(0)


def attend_once(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of a few queries over a cache, written out: for so few, fused kernels take three to four times as long on a CPU."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, keys.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores.add_(bias), -1), values)


class TransformersForward:
    """Any transformers causal model, with its own cache; prompts are left-padded with positions that start at zero."""

    def __init__(self, model: nn.Module):
        self.model, self.routers = model, Routers.of(model)

    def start(self, prompts: Sequence[Sequence[int]], branches: int, new_tokens: int) -> Tensor:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache, self.experts = None, None
        logits, told = self._run(ids, (self.attended.cumsum(-1) - 1).clamp(min=0))
        rows = None if told is None else told.unflatten(0, (len(prompts), width))
        self.prompt_experts = None if rows is None else [row[width - len(p) :] for row, p in zip(rows, prompts, strict=True)]
        return logits

    def advance(self, parents: np.ndarray, tokens: Tensor) -> Tensor:
        index = torch.from_numpy(parents).to(tokens.device)
        if len(parents) != len(self.attended) or (parents != np.arange(len(parents))).any():
            self.cache.batch_select_indices(index) if hasattr(self.cache, "batch_select_indices") else self.cache.reorder_cache(
                index
            )
            self.attended = self.attended[index]
        self.attended = F.pad(self.attended, (0, 1), value=1)
        logits, self.experts = self._run(tokens[:, None], self.attended.sum(-1, keepdim=True) - 1)
        return logits

    def finish(self) -> None:
        """Free the cache."""
        del self.cache, self.attended

    def _run(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        with nullcontext() if self.routers is None else self.routers.led() as heard:
            out = self.model(
                input_ids=ids,
                attention_mask=self.attended,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].float(), None if heard is None else _table(heard.chosen).cpu()
