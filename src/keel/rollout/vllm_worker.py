"""What keel runs inside vLLM's worker: take weights from a file, in place, and read back what the layers then compute with.

vLLM fuses projections and, on a CPU, packs matrices into a form of its own and drops the plain ones. A packed matrix is read back
by multiplying it with the identity, which is exact: every product but one is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keel.models.checksum import tensor_hash

AT_ONCE = 256  # rows of the identity in one product


class WeightReceiver:
    """Mixed into vLLM's worker by `worker_extension_cls`; called by name through `collective_rpc`."""

    def keel_load(self, path: str, aliases: Mapping[str, str]) -> dict[str, dict[str, str]]:
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
        return {"arrived": arrived, "in_use": dict(in_use(model, sent | {alias: sent[name] for alias, name in aliases.items()}))}


def pack_again(model: nn.Module, name: str) -> None:
    """Renew the packed copy of a layer that shares its matrix with another: vLLM 0.32 renews only the other's, so that on a CPU a tied
    head would go on computing with the weights that it was first loaded with.
    """
    module: Any = dict(model.named_modules(remove_duplicate=False)).get(name.rpartition(".")[0])
    if module is not None and hasattr(module, "cpu_linear"):
        module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def in_use(model: nn.Module, sent: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(name, hash) of every sent tensor that can be found again in the model's layers, as it stands there."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {}) or {}
    fused = {part: (whole, parts) for whole, parts in packed.items() for part in parts}
    modules = dict(model.named_modules(remove_duplicate=False))
    cache: dict[tuple[str, str], Tensor | None] = {}
    for name, tensor in sent.items():
        owner, _, kind = name.rpartition(".")
        parent, _, child = owner.rpartition(".")
        start = 0
        if owner not in modules and child in fused:
            whole, parts = fused[child]
            before = parts[: parts.index(child)]
            start = sum(sent[f"{parent}.{part}.{kind}"].shape[0] for part in before if f"{parent}.{part}.{kind}" in sent)
            owner = f"{parent}.{whole}"
        if owner not in modules:
            continue
        if (owner, kind) not in cache:
            cache = {(owner, kind): read(modules[owner], kind)}  # one layer at a time: a whole second model is not kept
        found = cache[owner, kind]
        if found is not None:
            part = found[start : start + tensor.shape[0]] if tensor.dim() else found
            yield name, tensor_hash(tensor if torch.equal(part, tensor) else part)  # the identity turns -0 into 0: values count


def read(module: Any, kind: str) -> Tensor | None:
    """A layer's tensor, out of its packed form where it has one; None where that cannot be done."""
    plain = getattr(module, kind, None)
    if kind != "weight" or not hasattr(module, "cpu_linear"):
        return plain if isinstance(plain, Tensor) and plain.numel() else None
    columns = getattr(module, "input_size_per_partition", None) or getattr(module, "embedding_dim", None)
    if columns is None:
        return None
    packed = _unpack(module, columns, plain.dtype)
    if plain.numel() and not torch.equal(plain, packed):  # an embedding keeps both: they must agree
        return torch.full_like(packed, float("nan"))
    return packed


def _unpack(module: Any, columns: int, dtype: torch.dtype) -> Tensor:
    rows = torch.eye(columns, dtype=dtype).split(AT_ONCE)
    return torch.cat([module.cpu_linear(part, module.weight, None) for part in rows]).T.contiguous()
