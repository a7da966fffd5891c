"""What keel runs inside vLLM's worker: take weights from a file, in place, and read back what the layers then compute with.

vLLM fuses projections and, on a CPU, packs matrices into a form of its own and drops the plain ones. A packed matrix is read back
by multiplying it with columns of the identity, which is exact: every product but one is zero. Other columns each time, at least
64 of them; smaller matrices whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keel.models.checksum import tensor_hash

COLUMNS = 64  # of a packed matrix, read back in one product


class WeightReceiver:
    """Mixed into vLLM's worker by `worker_extension_cls`; called by name through `collective_rpc`."""

    def keel_load(self, path: str, aliases: Mapping[str, str], version: int) -> dict[str, dict[str, str]]:
        """Load every tensor of a safetensors file into the running model.

        Args:
            aliases: name → the sent name whose memory it shares (a tied head → the embedding).

        Returns:
            "arrived": hash of each tensor as it was read; "in_use": hash of each as the layers hold it afterwards, left out
            where they hold it in a form that cannot be read back.
        """
        from safetensors.torch import load_file

        sent = load_file(path)
        arrived = {name: tensor_hash(tensor) for name, tensor in sent.items()}
        self.model_runner.reload_weights(weights_iterator=iter(sent.items()))
        model = self.model_runner.get_model()
        for alias in aliases:
            pack_again(model, alias)
        everything = sent | {alias: sent[name] for alias, name in aliases.items() if name in sent}
        return {"arrived": arrived, "in_use": dict(in_use(model, everything, version))}


def pack_again(model: nn.Module, name: str) -> None:
    """Renew the packed copy of a layer that shares its matrix with another. vLLM 0.32 renews only the other's, so that on a CPU a
    tied head would go on computing with the weights that it was first loaded with.
    """
    module: Any = dict(model.named_modules(remove_duplicate=False)).get(name.rpartition(".")[0])
    if module is not None and hasattr(module, "cpu_linear"):
        module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def in_use(model: nn.Module, sent: Mapping[str, Tensor], version: int) -> Iterator[tuple[str, str]]:
    """(name, hash) of every sent tensor that can be found again in the model's layers: of what stands there, or, where that is a
    part of a packed matrix, the sent tensor's own hash if the part agrees.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {}) or {}
    fused = {part: (whole, parts) for whole, parts in packed.items() for part in parts}
    last: tuple[Any, ...] = ()
    for name, tensor in sent.items():
        owner, start = _place(name, sent, modules, fused)
        kind = name.rpartition(".")[2]
        if owner not in modules:
            continue
        if last[:2] != (owner, kind):  # one layer at a time: a whole second model is never kept
            last = (owner, kind, read(modules[owner], kind, version))
        found, columns = last[2]
        if found is not None:
            part = found[start : start + tensor.shape[0]] if tensor.dim() else found
            expected = tensor if columns is None else tensor[:, columns]
            yield name, tensor_hash(tensor if torch.equal(part, expected) else part)  # by value: the identity turns -0 into 0


def _place(name: str, sent: Mapping[str, Tensor], modules: Mapping[str, nn.Module], fused: Mapping[str, Any]) -> tuple[str, int]:
    """(module, first row) of a sent tensor in vLLM's model."""
    owner, _, kind = name.rpartition(".")
    parent, _, child = owner.rpartition(".")
    if owner in modules or child not in fused:
        return owner, 0
    whole, parts = fused[child]
    before = [f"{parent}.{part}.{kind}" for part in parts[: parts.index(child)]]
    return f"{parent}.{whole}", sum(sent[other].shape[0] for other in before if other in sent)


def read(module: Any, kind: str, version: int) -> tuple[Tensor | None, slice | None]:
    """A layer's tensor and which columns of it: None for all. A packed matrix comes out of its packed form; nothing comes of a form
    that cannot be read.
    """
    plain = getattr(module, kind, None)
    if not isinstance(plain, Tensor):
        return None, None
    width = getattr(module, "input_size_per_partition", None) or getattr(module, "embedding_dim", None)
    if kind != "weight" or width is None or not hasattr(module, "cpu_linear"):
        return (plain if plain.numel() else None), None
    step = max(1, width // COLUMNS)
    columns = slice(version % step, None, step)
    found = module.cpu_linear(torch.eye(width, dtype=plain.dtype)[columns], module.weight, None).T
    if plain.numel() and not torch.equal(plain[:, columns], found):  # an embedding keeps both forms: they must agree
        found = torch.full_like(found, float("nan"))
    return found.contiguous(), columns
