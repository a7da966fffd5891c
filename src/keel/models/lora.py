"""Low-rank adapters through peft: what trains, what an engine is given, and when the reference is "adapters off".

y = W x + scale · B A x with scale = alpha / rank. Only A and B train; W stands still.

Source: LoRA, arXiv 2106.09685. Differs from it: no dropout, for the policy that is scored must be the policy that
    sampled.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.pytorch_utils
from torch import Tensor, nn

from keel.errors import KeelError
from keel.models.sharding import whole, whole_by_name

_FROM_ZERO = "keel_adapters_started_from_zero"
_PEFT_SAYS = (  # to its own developers, or of what it then puts right by itself
    "`is_gradient_checkpointing` is deprecated",
    "The following (rank|alpha)_pattern keys did not match",
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
)


@dataclass(frozen=True)
class LoraConfig:
    """Which adapters to put on a model.

    Args:
        rank: columns of B; at least 1.
        alpha: scale = alpha / rank.
        targets: names of linear layers, or "all-linear": every one but the output head. A mixture's experts and router
            are no linear layers, so on an MoE only attention is adapted.
        adapter: folder of a trained adapter to start from (its own rank, alpha and targets then hold); empty to start
            from zero.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    adapter: str = ""

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise KeelError(
                f"LoRA with rank {self.rank}, alpha {self.alpha} and targets {self.targets!r} adapts nothing. Expected "
                f"a rank of at least 1, a positive alpha and at least one layer name or 'all-linear'."
            )


def wrap(model: nn.Module, lora: LoraConfig, seed: int = 0) -> nn.Module:
    """The same model with adapters, of which alone the parameters train. The model itself is changed in place, as peft
    does.

    Args:
        seed: of A's first values; B starts at zero, so the wrapped model computes exactly what the model did.

    Raises:
        KeelError: peft is not installed, no layer bears a target's name, or the adapter's folder cannot be read.
    """
    peft = _peft()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # peft draws from the global random state
        for message in _PEFT_SAYS:
            warnings.filterwarnings("ignore", message)
        wrapped = _resume(peft, model, lora.adapter) if lora.adapter else _fresh(peft, model, lora)
    if not lora.adapter:
        _draw(wrapped, seed)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name)
    setattr(wrapped, _FROM_ZERO, _is_zero(wrapped))
    return wrapped.eval()


def started_from_zero(model: nn.Module) -> bool:
    """Whether "adapters off" is the policy as it was when training began. False where keel did not see the start."""
    return getattr(model, _FROM_ZERO, False)


@contextmanager
def reference(model: nn.Module) -> Iterator[nn.Module]:
    """The reference policy without a second copy of the weights: adapters off while the context lasts.

    Raises:
        KeelError: the adapters did not start from zero, so the model without them is *not* where training began, and a
            KL to it would pull the policy back to a model that nobody asked for. `plain_copy` at the start gives the
            right reference.
    """
    if not started_from_zero(model):
        raise KeelError(
            "The reference policy cannot be had by switching the adapters off: they did not start from zero (a trained "
            "adapter was loaded, or keel did not see the start), so the base model is not the policy that training "
            "began with. Take a frozen copy at the start instead (keel.models.lora.plain_copy), or merge the adapter "
            "first and train a fresh one."
        )
    with model.disable_adapter():
        yield model


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the plain model that computes the same: W + scale · B A where there is an adapter, else views of the
    live weights.

    Names are those of the model without peft. Nothing of the trained model is changed.
    """
    base = model.get_base_model()
    adapted = {f"{name}.base_layer.weight": layer for name, layer in _layers(base)}
    live = base.state_dict(keep_vars=True)
    tensors = whole_by_name({name: tensor for name, tensor in live.items() if ".lora_" not in name})
    for name in [name for name in tensors if name in adapted]:
        for b, a, scale in _factors(adapted[name]):
            tensors[name] = torch.addmm(tensors[name], whole(b), whole(a), alpha=scale)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


def plain_shapes(base: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of every tensor that `merged_weights` gives: what an engine must be handed, adapters or none.

    Args:
        base: the transformers model itself (`Policy.base`), with or without adapted layers in it.
    """
    plain = {name: tensor.shape for name, tensor in base.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): shape for name, shape in plain.items()}


def plain_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of a model, adapters merged and gone: a reference policy, or what an export saves."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "get_base_model"):
        twin = twin.unload()
        twin.load_state_dict(merged_weights(model))
    for parameter in twin.parameters():
        parameter.grad = None
    return twin.requires_grad_(False).eval()


def _peft():
    try:
        import peft
    except ImportError as error:
        raise KeelError(
            f"LoRA needs the package peft, which cannot be imported ({error}). Install it with `pip install "
            f"'keel-rl[lora]'`, or train all weights by leaving `lora` out."
        ) from error
    return peft


def _fresh(peft, model: nn.Module, lora: LoraConfig) -> nn.Module:
    targets = _linear_layers(model) if lora.targets == "all-linear" else lora.targets
    targets = [targets] if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
        raise KeelError(
            f"LoRA cannot be put on {lora.targets!r}: {error} This model's linear layers are {', '.join(linear)}; name "
            f"some of them, or 'all-linear'."
        ) from error


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head. peft's own "all-linear" would wrap a mixture's expert tensors too."""
    head = model.get_output_embeddings()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, linear) and module is not head]


def _resume(peft, model: nn.Module, folder: str) -> nn.Module:
    if not (Path(folder) / "adapter_config.json").is_file():
        raise KeelError(
            f"No adapter in {folder!r}: it holds no adapter_config.json. Expected a folder that peft's save_pretrained wrote."
        )
    try:
        wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    except Exception as error:  # whatever a corrupt folder makes peft, safetensors or torch raise
        raise KeelError(
            f"The adapter in {folder!r} cannot be put on this model: {type(error).__name__}: {error}. Expected an "
            f"adapter that was trained on the same base model, complete."
        ) from error
    for _, layer in _layers(wrapped.get_base_model()):
        for drop in layer.lora_dropout.values():
            if isinstance(drop, nn.Dropout):
                drop.p = 0.0
    return wrapped


def _layers(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _factors(layer: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(B, A, scale) of each active adapter, turned so that B A has the shape of the layer's weight."""
    factors = []
    for name in layer.active_adapters:
        if layer.merged or name not in layer.lora_A or name in getattr(layer, "lora_magnitude_vector", {}):
            raise KeelError(
                "This adapter is merged already, or of another kind (DoRA, or on an embedding): the weights are not "
                "W + scale · B A. Expected plain LoRA on linear layers, unmerged, as keel.models.lora.wrap makes it."
            )
        b, a = layer.lora_B[name].weight, layer.lora_A[name].weight
        factors.append((a.T, b.T, layer.scaling[name]) if layer.fan_in_fan_out else (b, a, layer.scaling[name]))
    return factors


def _draw(wrapped: nn.Module, seed: int) -> None:
    """A uniform in ±1/√inputs from a generator of its own, layer by layer. B stays at zero, as peft made it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _layers(wrapped.get_base_model()):
            for a in layer.lora_A.values():
                bound = 1 / math.sqrt(a.weight.shape[1])
                draw = torch.empty(a.weight.shape).uniform_(-bound, bound, generator=generator)
                a.weight.copy_(draw)


def _is_zero(wrapped: nn.Module) -> bool:
    """Whether every B is zero: then, whatever A is, the adapters change nothing."""
    layers = [layer for _, layer in _layers(wrapped.get_base_model())]
    return not any(bool(b.weight.any()) for layer in layers for b in layer.lora_B.values())
