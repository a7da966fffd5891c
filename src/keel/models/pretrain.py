"""Pretraining the bundled models from nothing: a Qwen3 decoder over characters, in minutes on two cores."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.errors import KeelError, nearest
from keel.models.characters import END, PAD, VOCABULARY, character_tokenizer, encode
from keel.models.corpus import MIXTURES, example
from keel.models.load import quiet

CONTEXT = 256
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
EXPERTS = dict(
    moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
    router_aux_loss_coef=0.01,
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    ".1M": dict(zip(SHAPE, (64, 2, 2, 1, 192), strict=True)),
    ".3M": dict(zip(SHAPE, (96, 3, 4, 2, 256), strict=True)),
    "1M": dict(zip(SHAPE, (160, 4, 4, 2, 400), strict=True)),
    "moe": dict(zip(SHAPE, (96, 3, 4, 2, 256), strict=True)) | EXPERTS,
}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        steps, rows: optimizer steps, and examples in each.
        lr: peak learning rate of AdamW; a linear warm-up, then a half cosine to a tenth of it.
        cuts: pieces that a step's rows are cut into by length, so that short rows are padded little.
    """

    steps: int
    rows: int = 96
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.01
    cuts: int = 3

    def lr_at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


BASE = {size: Schedule(steps=2600 if size == "moe" else 2000) for size in SIZES}
ALIGN = Schedule(steps=300, lr=5e-4)
Progress = Callable[[int, int, float], None]
Draw = Callable[[random.Random], tuple[str, str]]


def pretrain(
    size: str,
    kind: str = "base",
    seed: int = 0,
    out: str | Path | None = None,
    *,
    base: Schedule | None = None,
    align: Schedule = ALIGN,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a model from nothing and save it as a plain transformers folder.

    The same arguments give the same weights, bit for bit, on one kind of processor.

    Args:
        size: ".1M", ".3M", "1M" (dense) or "moe" (8 experts, top 2).
        kind: "base" (noisy mixture) or "aligned" (then tuned on clean answers that show their steps).
        out: the new folder; None trains without saving.
        base, align: schedules of the two phases; an aligned model goes through both. `base` is by default BASE[size].
        threads: of torch while it trains. Sums run in another order with another number, so weights differ a little.
        progress: called as progress(step, steps, loss in nats per token) after every step.

    Returns:
        size, kind, seed, parameters, steps, rows, threads, loss (nats per token, last 50 steps), seconds, and the
        model under "model".

    Raises:
        KeelError: unknown size or kind, or a folder that is not empty.
    """
    for what, name, known in (("size", size, SIZES), ("kind", kind, MIXTURES)):
        if name not in known:
            raise KeelError(f"Unknown {what} {name!r}: {nearest(name, known)}Expected one of {', '.join(known)}.")
    folder, base = None if out is None else _empty(Path(out)), base or BASE[size]
    model, start = new_model(size, seed), time.perf_counter()
    phases = [("base", base)] + ([("aligned", align)] if kind == "aligned" else [])
    total, losses = sum(schedule.steps for _, schedule in phases), []
    with _threads(threads):
        for loss in chain.from_iterable(fit(model, partial(example, MIXTURES[name]), s, f"{name} {seed}") for name, s in phases):
            losses.append(loss)
            if progress is not None:
                progress(len(losses), total, loss)
    report = {
        "size": size, "kind": kind, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "steps": total, "rows": base.rows, "threads": threads,
        "loss": round(sum(losses[-50:]) / max(1, len(losses[-50:])), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    if folder is not None:
        save(model, folder, report)
    return {**report, "model": model.eval()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(size: str, seed: int):
    """A random model of this size; the global random state stays as it was."""
    import transformers

    config = _config(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{size} {seed}".encode(), digest_size=4).digest(), "little"))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return model


def _config(size: str):
    import transformers

    make = transformers.Qwen3MoeConfig if size == "moe" else transformers.Qwen3Config
    return make(
        vocab_size=len(VOCABULARY), head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=PAD, attention_bias=False, dtype="float32", **SIZES[size],
    )  # fmt: skip


def fit(model, draw: Draw, schedule: Schedule, seed: str) -> Iterator[float]:
    """Train the model in place on fresh examples; yields each step's mean loss in nats per completion token.

    Args:
        draw: a random prompt and its completion.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    model.train()
    for step in range(schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
        rows = sorted((_row(draw, rng) for _ in range(schedule.rows)), key=lambda row: len(row[0]))
        tokens = sum(len(ids) - prompt for ids, prompt in rows)
        total = 0.0
        for piece in _cut(rows, schedule.cuts):
            loss, balance = _losses(model, *_padded(piece))
            (loss / tokens + balance * len(piece) / len(rows)).backward()
            total += loss.item() / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield total


def _row(draw: Draw, rng: random.Random) -> tuple[list[int], int]:
    """Token ids of one example with its end token, and the length of its prompt."""
    prompt, completion = draw(rng)
    return [*encode(prompt + completion), END], len(prompt)


def _cut(rows: list, pieces: int) -> Iterator[list]:
    bounds = [len(rows) * i // pieces for i in range(pieces + 1)]
    return (rows[low:high] for low, high in zip(bounds, bounds[1:], strict=False) if high > low)


def _padded(rows: list[tuple[list[int], int]]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Right-padded token ids, and True on completion tokens."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, prompt) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, prompt : len(ids)] = True
    return tokens, mask


def _losses(model, tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Summed −log p of completion tokens, and the weighted load-balancing loss of an MoE (0 of a dense model).

    Rows are padded on the right and attention is causal, so no token sees padding.
    """
    routed = getattr(model.config, "num_experts", 0) > 0
    out = model(input_ids=tokens, use_cache=False, **({"output_router_logits": True} if routed else {}))
    places = mask[:, 1:]
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][places], tokens[:, 1:][places], reduction="sum")
    return loss, model.config.router_aux_loss_coef * out.aux_loss if routed else torch.zeros(())


def save(model, folder: Path, report: dict[str, Any]) -> None:
    """A plain transformers folder (fp32), with how it was made in pretrain.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    _name_plainly(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "pretrain.json").write_text(json.dumps(report, indent=2) + "\n")


def _name_plainly(folder: Path) -> None:
    """Write the names that every version of transformers knows, for engines that bring an older one."""
    tokenizer, config = folder / "tokenizer_config.json", folder / "config.json"
    written = json.loads(tokenizer.read_text())
    written.pop("backend", None)
    tokenizer.write_text(json.dumps({**written, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    shape = json.loads(config.read_text())
    if "num_local_experts" in shape:
        config.write_text(json.dumps({**shape, "num_experts": shape["num_local_experts"]}, indent=2) + "\n")


def _empty(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KeelError(
            f"Folder {str(folder)!r} exists and is not empty. Expected a new one, so that no model is overwritten. "
            f"Name another folder, or remove this one."
        )
    return folder
