"""A model and its tokenizer, ready to train: fp32 master weights, no dropout, every end token known."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from keel.errors import KeelError
from keel.models.lora import LoraConfig, wrap
from keel.models.policy import Policy
from keel.models.sources import Source, locate
from keel.models.templates import Template, get_template, own_source, special_ids

CACHE_FORMAT = 1  # raised when what a cache folder holds changes
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_path|jitter")
log = logging.getLogger("keel")


def load_policy(
    name: str,
    *,
    template: str = "auto",
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    products: torch.dtype | None = None,
    recompute: bool = False,
) -> Policy:
    """A policy by name: the model, how it is asked, and what ends its completions.

    Args:
        name: a bundled name, `package:NAME`, a GGUF file, a folder, or a hub id, with `@revision` if wished.
        template: "auto", "none", a Jinja file or Jinja text (`templates.get_template`); checked here.
        lora: adapters to train instead of all weights.
        dtype: of the master weights. fp32, for smaller types round small updates away.
        seed: of the adapters' first values.
        products, recompute: as `Policy` takes them.

    Raises:
        KeelError: the model is missing, corrupt or quantised, or the template fails its checks.
    """
    model, tokenizer = load_model(name, dtype=dtype)
    asked = get_template(template, tokenizer)
    end_ids = find_end_ids(model, tokenizer, asked)
    asked.check(tokenizer, end_ids)
    if lora is not None:
        model = wrap(model, lora, seed)
    return Policy(model.to(device), tokenizer, asked, end_ids, name, products, recompute)


def load_model(name: str, *, dtype: torch.dtype = torch.float32):
    """The transformers model and its tokenizer, in eval mode and without any dropout.

    Raises:
        KeelError: missing, corrupt, incomplete, quantised, or not a causal language model.
    """
    source = locate(name)
    try:
        with quiet():
            model, tokenizer = _from_gguf(source, dtype) if source.gguf else _from_folder(source.folder, dtype)
    except KeelError:
        raise
    except Exception as error:  # a corrupt file shows itself in as many ways as there are formats
        where = source.file if source.gguf else source.folder
        raise KeelError(
            f"Model {name!r} cannot be read from {str(where)!r} ({_sizes(source)}): {_said(error)} "
            f"Expected a causal language model that transformers can load, whole. Fetch or export it again."
        ) from error
    _check(name, model, tokenizer)
    return silence(model), tokenizer


def silence(model: nn.Module) -> nn.Module:
    """The same model in eval mode, every dropout and jitter at zero: not even train mode scores a token otherwise."""
    model.eval()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for holder in (*configs.values(), *model.modules()):
        for key, value in vars(holder).items():
            if isinstance(value, float) and _NOISE.search(key):
                setattr(holder, key, 0.0)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def find_end_ids(model: nn.Module, tokenizer, template: Template | None = None) -> frozenset[int]:
    """Every token that ends a completion: those of both configurations and of the tokenizer, the special token with
    which the chat templates close an answer, and well-known end tokens that this tokenizer marks as special.

    Raises:
        KeelError: there is none, so no completion could ever end.
    """
    found: set[int] = set()
    for holder in (model.generation_config, model.config, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    special = {tokenizer.convert_ids_to_tokens(i): i for i in special_ids(tokenizer)}
    found.update(special[token] for token in END_TOKENS if token in special)
    for asked in (template, Template("tokenizer", own_source(tokenizer))):
        closing = asked.turn_end(tokenizer) if asked is not None else None
        found.update([] if closing is None else [closing])
    rows = model.get_output_embeddings().weight.shape[0]
    ends = frozenset(i for i in found if 0 <= i < rows)
    if not ends:
        raise KeelError(
            f"No end token is known: neither config.json nor generation_config.json nor the tokenizer names one that "
            f"the model can write (its head has {rows} rows). Every completion would run into its cap. Set "
            f"eos_token_id in generation_config.json."
        )
    return ends


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers inside; as they were afterwards."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            hf_logging.enable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        raise KeelError(
            f"The model in {str(folder)!r} is quantised ({_method(quantised)}); training needs full weights, for "
            f"rounded ones cannot take small updates. Take the unquantised model that it was made from."
        )
    model, report = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    absent = sorted(map(str, report["missing_keys"]))
    if absent:
        raise KeelError(
            f"The model in {str(folder)!r} lacks {len(absent)} of the tensors that its config.json describes, the "
            f"first being {absent[0]!r}; they would have been filled with random numbers. Expected all. Fetch or "
            f"export the model again."
        )
    return model, AutoTokenizer.from_pretrained(folder)


def _method(quantised) -> str:
    known = quantised if isinstance(quantised, dict) else vars(quantised)
    return str(known.get("quant_method", "by an unnamed method"))


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def cache_root() -> Path:
    """Where keel keeps what it can make again: $KEEL_CACHE, else $XDG_CACHE_HOME/keel, else ~/.cache/keel."""
    own = os.environ.get("KEEL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keel"


def _from_gguf(source: Source, dtype: torch.dtype):
    """The dequantised model. Dequantising is slow, so its result is kept as fp32 safetensors, by the file's hash."""
    kept = cache_root() / "gguf" / f"{source.file.stem}-{_file_hash(source.file)}-v{CACHE_FORMAT}"
    if not kept.is_dir():
        model, tokenizer = _dequantise(source)
        if not _keep(model, tokenizer, kept):
            return model.to(dtype), tokenizer
    try:
        return _from_folder(kept, dtype)
    except Exception as error:
        raise KeelError(
            f"keel's own copy of {source.gguf!r} in {str(kept)!r} cannot be read: {_said(error)} "
            f"Delete that folder; it will be made again from the GGUF file."
        ) from error


def _dequantise(source: Source):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [package for package in ("gguf", "accelerate") if not _importable(package)]
    if missing:
        raise KeelError(
            f"Reading {source.gguf!r} needs the package {' and '.join(missing)}. Install with `pip install 'keel-rl[gguf]'`."
        )
    log.info("dequantising %s once; the result is kept in %s", source.gguf, cache_root())
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf)
    model = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf, dtype=torch.float32)
    for holder, key in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if key in vars(holder):
            delattr(holder, key)
    model.is_quantized = False
    return model, tokenizer


def _keep(model: nn.Module, tokenizer, folder: Path) -> bool:
    """Write a cache folder whole or not at all; False (and a warning) where it cannot be written."""
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not folder.is_dir():  # another process may have been quicker
            os.rename(part, folder)
        return True
    except OSError as error:
        warnings.warn(f"keel cannot keep the dequantised model in {folder}: {error}. It goes on without.", stacklevel=2)
        return False
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _importable(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(name: str, model: nn.Module, tokenizer) -> None:
    rows = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise KeelError(
            f"Model {name!r}: its tokenizer has {len(tokenizer)} tokens and its head {rows} rows, so they are not of "
            f"one model. Expected at least as many rows as tokens. Put the model's own tokenizer into its folder."
        )
    for key, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise KeelError(
                f"Model {name!r}: tensor {key!r} holds numbers that are not finite, so the file is corrupt, or was "
                f"saved from a run that had gone wrong. Expected finite weights. Fetch it again, or go back to an "
                f"earlier checkpoint."
            )


def _said(error: Exception) -> str:
    """An error's kind and first line, as one sentence."""
    first = next(iter(str(error).strip().splitlines()), "without a word")
    return f"{type(error).__name__}: {first.rstrip('. ')}."


def _sizes(source: Source) -> str:
    files = [source.file] if source.gguf else sorted(p for p in source.folder.iterdir() if p.is_file())
    listed = [f"{p.name} {p.stat().st_size:,} bytes" for p in files[:8]]
    return ", ".join(listed) or "empty"
