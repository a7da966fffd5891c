"""A trained policy as a plain transformers folder that any engine loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.errors import KeelError
from keel.models.load import quiet
from keel.models.lora import plain_copy
from keel.models.policy import Policy

PROBE_TOKENS = 24
TOLERANCE = 1e-4  # nats between the policy and the folder read back: merging LoRA rounds once


def export(policy: Policy, folder: str | Path) -> Path:
    """Write `config.json`, `model.safetensors`, the tokenizer and its template, LoRA merged, and read it all back.

    The folder appears whole or not at all. Its generation_config names every end token and no sampling parameters, so
    that no engine quietly samples otherwise than the policy was trained; the tokenizer carries the chat template it was
    trained with.

    Returns:
        The folder.

    Raises:
        KeelError: the folder exists, cannot be written, or reads back as another policy; nothing is left behind.
    """
    target = Path(folder).expanduser()
    if target.exists() or target.is_symlink():
        raise KeelError(f"Cannot export to {str(target)!r}: it exists, and nothing is overwritten. Name a new folder.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        with quiet():
            _write(policy, part)
        _check_reload(policy, part)
        os.rename(part, target)
    except OSError as error:
        raise KeelError(
            f"Cannot export to {str(target)!r}: {error}. Nothing was left there. Make room or choose another place, "
            f"and export again."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _write(policy: Policy, folder: Path) -> None:
    model = plain_copy(policy.model) if policy.model is not policy.base else policy.base
    model.save_pretrained(folder)
    _neutral_generation_config(policy).save_pretrained(folder)
    tokenizer = copy.deepcopy(policy.tokenizer)
    if policy.template.source:
        tokenizer.chat_template = policy.template.source
    tokenizer.save_pretrained(folder)
    record = {"name": policy.name, "end_ids": sorted(policy.end_ids), **policy.template.describe()}
    (folder / "keel_export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _neutral_generation_config(policy: Policy):
    """All end tokens, and nothing that shapes sampling."""
    from transformers import GenerationConfig

    config = policy.base.config
    return GenerationConfig(
        eos_token_id=sorted(policy.end_ids),
        bos_token_id=getattr(config, "bos_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
    )


@torch.no_grad()
def _check_reload(policy: Policy, folder: Path) -> None:
    """The folder, read as other engines read it, gives the policy's log-probabilities on a probe, and its token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=policy.base.dtype).to(policy.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    probe = _probe(policy)
    gap = float((_log_probs(model, probe) - _log_probs(policy.model, probe)).abs().max())
    if not gap <= TOLERANCE:
        raise KeelError(
            f"The export of {policy.name!r} reads back as another policy: log-probabilities differ by {gap:.2g} nats; "
            f"at most {TOLERANCE} was expected. Nothing was left behind. transformers does not save this architecture "
            f"faithfully; please report it with the architecture {type(policy.base).__name__}."
        )
    text = policy.template.text("17 + 25 = ?", policy.tokenizer)
    if tokenizer(text).input_ids != policy.tokenizer(text).input_ids:
        raise KeelError(
            f"The export of {policy.name!r} reads back with another tokenizer: {text!r} gets other token ids. Nothing "
            f"was left behind. Expected a tokenizer that save_pretrained keeps; take the model's fast tokenizer."
        )


def _probe(policy: Policy) -> Int[Tensor, "1 T"]:
    generator = torch.Generator().manual_seed(0)
    rows = policy.base.get_output_embeddings().weight.shape[0]
    tokens = min(PROBE_TOKENS, policy.context)
    return torch.randint(0, rows, (1, tokens), generator=generator).to(policy.device)


def _log_probs(model: nn.Module, probe: Int[Tensor, "1 T"]) -> Float[Tensor, "1 T V"]:
    return model(input_ids=probe, use_cache=False).logits.float().log_softmax(-1)
