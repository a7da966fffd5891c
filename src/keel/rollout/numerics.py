"""In which arithmetic the local engine computes: a gap on purpose, by real rounding and not by added noise.

A serving engine differs from the trainer in number formats and in the order of its sums. Here the same differences are made one
at a time, so that what each does to a run can be seen. Only `router_noise` is noise, and it is asked for by that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keel.errors import KeelError

if TYPE_CHECKING:
    from keel.config import EngineSettings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP8_LARGEST = 448.0  # of e4m3
CHUNKS = 4  # parts of a sum in the "separate" order
SPARED = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "router", "mlp.gate.weight")  # by servers, and so here


def round_integer(weight: Float[Tensor, "*rows n"], bits: int) -> Float[Tensor, "*rows n"]:
    """Each row rounded to multiples of (its largest magnitude) / (2^(bits−1) − 1): symmetric integers with one scale a row."""
    largest = 2 ** (bits - 1) - 1
    scale = _row_scale(weight, largest)
    return (weight / scale).round().clamp(-largest, largest) * scale


def round_fp8(weight: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Each row scaled to fill e4m3 (4 bits of exponent, 3 of mantissa), rounded to it, and scaled back."""
    scale = _row_scale(weight, FP8_LARGEST)
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _row_scale(weight: Tensor, largest: float | int) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, scale, 1.0)


def rounded(weight: Float[Tensor, "*rows n"], name: str) -> Float[Tensor, "*rows n"]:
    """A matrix in the format of that name; bf16 and fp16 change its dtype, fp8 and int8 only its values."""
    if name in DTYPES:
        return weight.to(DTYPES[name])
    return {"fp32": lambda: weight, "fp8": lambda: round_fp8(weight), "int8": lambda: round_integer(weight, 8)}[name]()


def chunked_product(
    x: Float[Tensor, "*rows n"], weight: Float[Tensor, "m n"], bias: Float[Tensor, " m"] | None = None, chunks: int = CHUNKS
) -> Float[Tensor, "*rows m"]:
    """x Wᵀ (+ b) with the sum over n cut in `chunks` parts, each rounded to x's dtype before it is added to the ones before."""
    parts = zip(x.chunk(chunks, -1), weight.chunk(chunks, -1), strict=True)
    total = sum(F.linear(piece, matrix) for piece, matrix in parts)
    return total if bias is None else total + bias


@dataclass(frozen=True)
class Numerics:
    """How an engine computes. The defaults compute what the trainer computes.

    Args:
        format: fp32, as the trainer; bf16 or fp16: weights and activations in that dtype; fp8 or int8: the matrices of all layers
            rounded row by row, products in fp32. As in servers, embedding, norms, router and head keep their own.
        weight_bits: the layers' matrices rounded row by row to integers of so many bits; products in the dtype of `format`.
        head_format: of the output head's weights and product; None is what `format` says (fp32 for fp8 and int8).
        order: of sums: "fused" products, or "separate" ones, each summed in parts.
        router_noise: standard deviation of normal noise on the router's logits of a mixture of experts.
    """

    format: str = "fp32"
    weight_bits: int | None = None
    head_format: str | None = None
    order: str = "fused"
    router_noise: float = 0.0

    @classmethod
    def of(cls, settings: EngineSettings) -> Numerics:
        """As the settings name it."""
        return cls(settings.format, settings.weight_bits, settings.head_format, settings.order, settings.router_noise)

    @property
    def exact(self) -> bool:
        """Whether nothing differs from the trainer but the last bits of fp32 sums."""
        return self.format == self.head == "fp32" and self.weight_bits is None and self.router_noise == 0.0

    @property
    def dtype(self) -> torch.dtype | None:
        """Of activations; None is the policy's own."""
        return DTYPES.get(self.format)

    @property
    def head(self) -> str:
        """Format of the output head."""
        return self.head_format or (self.format if self.format in DTYPES else "fp32")

    def describe(self) -> dict[str, object]:
        """For the manifest."""
        return asdict(self)

    def weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The engine's copy of the weights: rounded, and in its dtype. Tensors that shared memory (a tied head) share it still."""
        if self.format == "fp32" and self.weight_bits is None:
            return weights
        seen: dict[tuple, Tensor] = {}
        out = {}
        for name, weight in weights.items():
            key = (weight.data_ptr(), weight.shape, weight.stride(), _is_layer_matrix(name, weight))
            if key not in seen:
                seen[key] = self._lowered(name, weight)
            out[name] = seen[key]
        return out

    def _lowered(self, name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point():
            return weight
        if _is_layer_matrix(name, weight):
            weight = weight if self.weight_bits is None else round_integer(weight, self.weight_bits)
            weight = rounded(weight, self.format)
        return weight if self.dtype is None else weight.to(self.dtype)

    def check(self, model: str, compact: bool, experts: bool) -> None:
        """Refuse what would be ignored.

        Args:
            model: its name.
            compact: whether the compact decoder runs it; order, head and router are in keel's hands only there.
            experts: whether it is a mixture of experts.

        Raises:
            KeelError: naming the setting.
        """
        asked = {
            "head_format": self.head_format is not None,
            "order": self.order != "fused",
            "router_noise": self.router_noise > 0,
        }
        wanted = [name for name, on in asked.items() if on]
        if wanted and not compact:
            raise KeelError(
                f"engine.{wanted[0]} was asked for, and {model!r} runs through transformers, which has its own head, router and "
                "order of sums. Expected a Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE model, or only engine.format and "
                "engine.weight_bits, which hold for every model."
            )
        if self.router_noise > 0 and not experts:
            raise KeelError(
                f"engine.router_noise is {self.router_noise}, and {model!r} has no router. Expected a mixture of experts, for "
                "instance tiny-moe; or engine.router_noise = 0."
            )


EXACT = Numerics()


def _is_layer_matrix(name: str, weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.ndim >= 2 and not any(part in name for part in SPARED)


class RouterNoise:
    """Normal noise on router logits, from a generator of its own: the same seed gives the same noise.

    Args:
        scale: standard deviation, in the unit of the logits.
    """

    def __init__(self, scale: float):
        self.scale, self.generator = scale, torch.Generator()

    def seed(self, run: int, step: int) -> None:
        """Begin anew."""
        self.generator.manual_seed((run * 1_000_003 + step) % 2**63)

    def __call__(self, logits: Float[Tensor, "N experts"]) -> Float[Tensor, "N experts"]:
        if self.scale == 0.0:
            return logits
        noise = torch.randn(logits.shape, generator=self.generator)
        return logits + self.scale * noise.to(logits)
