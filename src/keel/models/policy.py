"""The policy: a transformers model, its tokenizer and template, and log-probabilities of completions under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keel.errors import KeelError
from keel.models.decoder import Decoder, supports
from keel.models.head import token_logp
from keel.models.packing import Packing, pack
from keel.models.routing import UNKNOWN, Routers, Routing, check_replayable
from keel.models.sharding import whole_by_name, within
from keel.types import Batch


@dataclass(frozen=True)
class TokenLogp:
    """What a forward pass says of each completion token.

    Args:
        logp: [B, T] nats at the sampling temperature, over kept tokens; 0 past a completion's end.
        entropy: [B, T] nats, of the distribution that the token was drawn from; 0 past the end.
        experts: [B, L, layers, k] experts that every token would go to by itself (with replay: given where those before it went);
            −1 past a row's end. None for a dense model, or a mixture whose routers keel cannot hear.
    """

    logp: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    experts: Int[Tensor, "B L layers k"] | None = None

    def to(self, device: torch.device) -> TokenLogp:
        """The same on another device."""
        return TokenLogp(*(None if value is None else value.to(device) for value in vars(self).values()))


class Policy:
    """A language model that is trained and sampled from.

    Args:
        model: a transformers causal model in eval mode (dropout off), fp32 master weights; may be wrapped by peft.
        tokenizer: its tokenizer.
        template: how a prompt becomes token ids (`models.templates.Template`).
        end_ids: every token id that ends a completion.
        name: as the user named it.
        products: type that matrix products are computed in (autocast); None = that of the weights. The head's are always in that
            of the weights, for a log-probability in bf16 has two digits.
        recompute: keep only what goes into each layer, and compute the rest again in backward: less memory, more time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        template,
        end_ids: frozenset[int],
        name: str,
        products: torch.dtype | None = None,
        recompute: bool = False,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.end_ids, self.name = frozenset(end_ids), name
        self.products, self.recompute = products, recompute
        if recompute and self.decoder is None:
            _recompute_layers(self.base)

    def over(self, model: nn.Module) -> Policy:
        """The same policy with another model in it."""
        return Policy(model, self.tokenizer, self.template, self.end_ids, self.name, self.products, self.recompute)

    @property
    def base(self) -> nn.Module:
        """The transformers model itself, under any peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def context(self) -> int:
        """Longest prompt + completion, in tokens."""
        return self.base.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.base.get_output_embeddings().weight.device

    @cached_property
    def decoder(self) -> Decoder | None:
        """The compact decoder, where it computes this architecture; else None."""
        return Decoder(self.base, self.recompute) if supports(self.base.config) else None

    @cached_property
    def routers(self) -> Routers | None:
        """The routers of a mixture of experts that runs through transformers, where keel can hear and lead them."""
        return None if self.decoder is not None else Routers.of(self.base)

    @property
    def routing(self) -> Routing | None:
        """Sizes of the routing that can be recorded and replayed; None for a dense model, or a mixture that cannot be led."""
        held = self.decoder.routing if self.decoder is not None else None
        return held if self.routers is None else self.routers.shape

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, each once (a tied head belongs to the embedding)."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        """Everything an engine needs, under the plain transformers names, LoRA merged; views of the live weights otherwise. Where
        they are cut over processes, gathered copies: all of them have to ask.
        """
        if self.model is not self.base:
            from keel.models.lora import merged_weights

            return merged_weights(self.model)
        return whole_by_name(self.model.state_dict(keep_vars=True))

    def logp(self, batch: Batch, *, temperature: float = 1.0, replay_experts: bool = False) -> TokenLogp:
        """Log-probability and entropy of every completion token of a batch; differentiable.

        Args:
            batch: its `tokens`, lengths, `kept` and, with `replay_experts`, `experts` are read.
            temperature: of the sampler; logits are divided by it once, here.
            replay_experts: send tokens to `batch.experts`, where they are not −1, with weights of the router's own.

        Raises:
            KeelError: experts are to be replayed, and the model has none, or none that can be led.
        """
        host, batch = batch.tokens.device, batch.to(self.device)
        replay = batch.experts if replay_experts else None
        if replay is not None:
            check_replayable(self.name, self.base.config, self.routing)
        compute = self._logp_by_transformers if self.decoder is None else self._logp_by_decoder
        return compute(batch, temperature, replay).to(host)

    def _logp_by_decoder(self, batch: Batch, temperature: float, replay: Tensor | None = None) -> TokenLogp:
        packing = pack(batch.tokens, batch.prompt_len + batch.completion_len, batch.kept is None, replay)
        routing = None if replay is None else _by_node(replay, packing)
        logp, entropy, experts = within(self.base, self._run_decoder, batch, packing, routing, temperature)
        return TokenLogp(logp, entropy, None if experts is None else _by_row(experts[packing.node], batch))

    def _run_decoder(self, batch: Batch, packing: Packing, routing: Tensor | None, temperature: float):
        with self._computing():
            hidden, experts = self.decoder.hidden(packing, routing)
        return *self._read(batch, packing, hidden, temperature), experts

    def _computing(self) -> AbstractContextManager:
        """Where matrix products are computed in the policy's `products`."""
        return nullcontext() if self.products is None else torch.autocast(self.device.type, self.products)

    def _read(self, batch: Batch, packing: Packing, hidden: Tensor, temperature: float):
        inside, column = completion_places(batch, packing.node.shape[1])
        node = packing.node.gather(1, column)[inside]
        edge_node, edge = torch.unique(node, return_inverse=True)
        state_node, state = torch.unique(packing.parent[edge_node], return_inverse=True)
        kept = None
        if batch.kept is not None:  # nothing is shared then: one place, one edge, one state
            kept = torch.empty_like(batch.kept[inside])
            kept[state[edge]] = batch.kept[inside]
        weight = self.base.get_output_embeddings().weight
        token = packing.tokens[edge_node]
        logp, entropy = token_logp(hidden[state_node].to(weight.dtype), weight, state, token, temperature=temperature, kept=kept)
        return _spread(logp[edge], inside), _spread(entropy[state][edge], inside)

    def _logp_by_transformers(self, batch: Batch, temperature: float, replay: Tensor | None = None) -> TokenLogp:
        led = nullcontext() if self.routers is None else self.routers.led(_flat(replay, batch))
        linear = self.head_is_linear  # measured by a forward pass of its own, so before routers are led
        with led as heard:
            logp, entropy = within(self.base, self._run_transformers, batch, temperature, linear)
        if heard is None:
            return TokenLogp(logp, entropy)
        return TokenLogp(logp, entropy, _by_row(heard.table().unflatten(0, (len(batch), -1)), batch))

    def _run_transformers(self, batch: Batch, temperature: float, linear: bool) -> tuple[Tensor, Tensor]:
        lengths = batch.prompt_len + batch.completion_len
        width = int(lengths.max())
        position = torch.arange(width, device=batch.tokens.device)
        attended = position < lengths[:, None]
        inputs = dict(
            input_ids=torch.where(attended, batch.tokens[:, :width], 0),
            attention_mask=attended.long(),
            position_ids=position.expand(len(batch), -1),
            use_cache=False,
        )
        inside, column = completion_places(batch, width)
        flat = (column - 1 + width * torch.arange(len(batch), device=column.device)[:, None])[inside]
        token = batch.tokens.gather(1, column)[inside]
        kept = None if batch.kept is None else batch.kept[inside]
        edge = torch.arange(len(token), device=token.device)
        if linear:
            with self._computing():
                hidden = self.base.base_model(**inputs).last_hidden_state
            weight, softcap = self.base.get_output_embeddings().weight, self._softcap
            hidden = hidden.flatten(0, 1)[flat].to(weight.dtype)
            logp, entropy = token_logp(hidden, weight, edge, token, temperature=temperature, softcap=softcap, kept=kept)
        else:
            with self._computing():
                logits = self.base.forward(**inputs).logits
            logits = logits.flatten(0, 1)[flat].float() / temperature
            if kept is not None:
                logits = logits.masked_fill(~kept, float("-inf"))
            log_probs = logits.log_softmax(-1)
            logp = log_probs[edge, token]
            probs = log_probs.exp()
            entropy = -(probs * torch.where(probs > 0, log_probs, 0.0)).sum(-1)
        return _spread(logp, inside), _spread(entropy, inside)

    @property
    def _softcap(self) -> float | None:
        return getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)

    @cached_property
    def head_is_linear(self) -> bool:
        """Whether the logits are (soft-capped) hidden states times the head's weight: measured on eight tokens, not assumed."""
        with torch.no_grad():
            ids = torch.arange(8, device=self.device)[None] % self.base.get_output_embeddings().weight.shape[0]
            logits = self.base(input_ids=ids, use_cache=False).logits
            ours = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            ours = ours @ self.base.get_output_embeddings().weight.T
            if self._softcap is not None:
                ours = self._softcap * torch.tanh(ours / self._softcap)
        return bool(torch.allclose(logits.to(ours.dtype), ours, rtol=1e-4, atol=1e-5))


def _recompute_layers(base: nn.Module) -> None:
    """Checkpoint every layer of a transformers model; it does so in train mode alone, and no dropout is left that this would wake.

    Raises:
        KeelError: the architecture does not know how.
    """
    if not base.supports_gradient_checkpointing:
        raise KeelError(
            f"train.checkpoint_activations is true, and transformers cannot checkpoint {type(base).__name__}. Expected an "
            "architecture that can; set it to false, and lower train.micro_batch_tokens to save memory."
        )
    base.activation_checkpointing_enable()
    base.train()


def completion_places(batch: Batch, width: int) -> tuple[Bool[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Where completion tokens are: a mask of real ones [B, T], and the column of `tokens` that each stands in (clamped inside)."""
    t = torch.arange(batch.mask.shape[1], device=batch.tokens.device)
    inside = t < batch.completion_len[:, None]
    return inside, (batch.prompt_len[:, None] + t).clamp(max=width - 1)


def _spread(values: Float[Tensor, " n"], inside: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return values.new_zeros(inside.shape).masked_scatter(inside, values)


def _by_node(experts: Int[Tensor, "B L layers k"], packing: Packing) -> Int[Tensor, "N layers k"]:
    """Recorded routing of each token, moved from rows to nodes."""
    inside = torch.arange(packing.node.shape[1], device=experts.device) < packing.lengths[:, None]
    routing = experts.new_empty(len(packing), *experts.shape[2:])
    routing[packing.node[inside]] = experts[:, : packing.node.shape[1]][inside]
    return routing


def _flat(experts: Int[Tensor, "B L layers k"] | None, batch: Batch) -> Int[Tensor, "N layers k"] | None:
    """Recorded routing as a right-padded forward pass meets its tokens: row after row, unknown past a row's end."""
    if experts is None:
        return None
    lengths = batch.prompt_len + batch.completion_len
    width = int(lengths.max())
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]
    return torch.where(inside[:, :, None, None], experts[:, :width], UNKNOWN).flatten(0, 1)


def _by_row(experts: Int[Tensor, "B W layers k"], batch: Batch) -> Int[Tensor, "B L layers k"]:
    """Experts of every token as small integers, as wide as the batch; −1 past a row's end."""
    lengths, width = batch.prompt_len + batch.completion_len, experts.shape[1]
    inside = torch.arange(width, device=lengths.device) < lengths[:, None]
    told = torch.where(inside[:, :, None, None], experts, UNKNOWN).to(torch.int16)
    return F.pad(told, (0, 0, 0, 0, 0, batch.tokens.shape[1] - width), value=UNKNOWN)
