"""vLLM as keel's engine: the same contract as the local one, kept by a serving engine in processes of its own.

Prompts go in and completions come out as token ids. Every sampling field is sent; nothing comes from a model's generation_config.
Weights are exchanged in place: each tensor's checksum is compared on vLLM's side, the layers are read back, the prefix cache is
emptied, and a probe compares log-probabilities with a forward pass. Every wait ends after `engine.timeout_s`.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from keel.config import EngineSettings
from keel.errors import KeelError
from keel.models.checksum import check_complete, checksum, fingerprints
from keel.models.lora import plain_shapes
from keel.models.policy import Policy
from keel.rollout.engine import Seed
from keel.rollout.probe import Reference, check_probe, probe
from keel.rollout.vllm_parts import (
    DTYPES,
    aliases_of,
    check_receipt,
    engine_fields,
    import_vllm,
    read_finish,
    refuse_local_settings,
    refuse_routed_experts,
    refuse_truncated,
    sampling_fields,
    seed_of,
    split_routing,
    staging_folder,
    within,
    write_architecture,
)
from keel.types import Completion, Prompt, Sampling

T = TypeVar("T")


class VllmEngine:
    """Samples with vLLM.

    Args:
        policy: gives the architecture and end tokens; its weights are loaded as version 0.
        settings: `engine` of the run.

    Raises:
        KeelError: vLLM is not installed, does not run this model, or does not return processed log-probabilities.
    """

    def __init__(self, policy: Policy, settings: EngineSettings):
        refuse_local_settings(settings)
        if settings.routed_experts:
            refuse_routed_experts(policy.device.type)
        self.policy, self.settings, self.dtype = policy, settings, DTYPES[settings.format]
        self.eager = settings.eager_on(policy.device.type)
        self.context = min(policy.context, settings.max_model_len or policy.context)
        self.version, self.awake, self.dead = -1, False, ""
        self.processes: list[Any] = []
        self.unread: list[str] = []
        self.gap = float("nan")
        self.reference = Reference(policy)
        self.vllm = import_vllm()
        self._refuse_daemon()
        self.llm = self._bounded(self._start, "starting")
        try:
            self.load(policy.weights(), 0)
        except KeelError:
            self.close()
            raise

    @property
    def exact(self) -> bool:
        """Whether its policy is the trainer's but for rounding in fp32."""
        return self.settings.format == "fp32"

    # ---- the contract ------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Seed, group_size: int) -> list[Completion]:
        """`group_size` completions of each prompt, in prompt order.

        Raises:
            KeelError: sampling is truncated, a prompt does not fit, the engine sleeps, died, or gave no answer in time.
        """
        refuse_truncated(sampling)
        if not self.awake:
            raise KeelError(f"The engine sleeps since version {self.version}. Call `load` with the weights to sample from first.")
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        places = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        asked = [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in places]
        fields = [sampling_fields(sampling, self.policy.end_ids, seed_of(seed.row(p.id, s))) for p, s in places]
        params = [self.vllm.SamplingParams(**f) for f in fields]
        what = f"sampling {len(places)} completions"
        outputs = self._bounded(lambda: self.llm.generate(asked, params, use_tqdm=False), what)
        return [self._completion(p, s, out.outputs[0], sampling) for (p, s), out in zip(places, outputs, strict=True)]

    def load(self, weights: Mapping[str, Tensor], version: int) -> str:
        """Put these weights in the place of the old ones, and prove it.

        Returns:
            Their checksum.

        Raises:
            KeelError: a tensor is missing (the old weights stay), did not arrive, or is not what the layers compute with; the
                prefix cache could not be emptied; or the probe found other log-probabilities. The engine then sleeps.
        """
        check_complete(weights, plain_shapes(self.policy.base), self.version)
        self.awake = False
        self._exchange(weights, version)
        if not self._bounded(self._reset_prefix_cache, "emptying its prefix cache"):
            raise KeelError(
                f"Weight sync to version {version}: vLLM did not empty its prefix cache, so prompts would go on from keys and "
                "values of older weights. Expected no request to be under way during a sync."
            )
        self.version, self.awake = version, True
        try:
            found = probe(self, self.policy, weights, self.context, self.reference)
            check_probe(found, self.dtype, version)
        except KeelError:
            self.awake = False
            raise
        self.gap = found.largest
        return checksum(weights)

    def sleep(self) -> None:
        """Generate nothing until the next `load`. Its memory stays taken: on a CPU vLLM gives none back."""
        self.awake = False

    def describe(self) -> dict[str, object]:
        """For the manifest: every setting that can change a token, and what the last probe measured."""
        return {
            "engine": "vllm",
            "vllm": self.vllm.__version__,
            "dtype": self.dtype,
            "max_model_len": self.context,
            "kv_cache_gb": self.settings.kv_cache_gb,
            "logprobs_mode": "processed_logprobs",
            "prefix_caching": "emptied at every sync",
            "enforce_eager": self.eager,
            "generation_config": "ignored",
            "probe_max_abs_nats": self.gap,
            "tensors_not_read_back": list(self.unread),
        }

    def close(self) -> None:
        """End vLLM's processes, by their ids."""
        self.awake, self.dead = False, self.dead or "it was closed"
        for process in self.processes:
            process.terminate()
        for process in self.processes:  # by their sentinels: vLLM's own watcher may have taken the exit code before us
            if not wait([process.sentinel], 5.0):
                process.kill()
                wait([process.sentinel], 5.0)
        self.processes = []

    # ---- starting ----------------------------------------------------------------------------------------------------

    def _start(self) -> Any:
        """A vLLM with the architecture alone; its weights come by `load`, as all later ones do."""
        resource_tracker.ensure_running()  # its first start would unblock what is blocked next
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread and of what it starts: Ctrl-C is the trainer's
        folder = Path(tempfile.mkdtemp(prefix="keel-vllm-"))
        before = set(multiprocessing.active_children())
        try:
            write_architecture(self.policy, folder)
            return self.vllm.LLM(**engine_fields(folder, self.context, self.settings, self.eager))
        finally:
            self.processes = [p for p in multiprocessing.active_children() if p not in before]
            shutil.rmtree(folder, ignore_errors=True)

    def _refuse_daemon(self) -> None:
        if multiprocessing.current_process().daemon:
            raise KeelError(
                "vLLM starts processes of its own, and a daemonic process, which this one is, may have none. Expected to run in "
                "the main process or in a worker that is no daemon; sample in turn (train.max_staleness = 0)."
            )

    # ---- weights -----------------------------------------------------------------------------------------------------

    def _exchange(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send, in the engine's number format, and compare what the worker read and what its layers hold with what was sent."""
        dtype, aliases = getattr(torch, self.dtype), aliases_of(weights)
        sent = {
            name: t.to("cpu", dtype if t.is_floating_point() else t.dtype) for name, t in weights.items() if name not in aliases
        }
        expected = fingerprints(sent)
        with tempfile.TemporaryDirectory(prefix="keel-weights-", dir=staging_folder(sent)) as folder:
            path = str(Path(folder) / "weights.safetensors")
            self._stage(sent, path)
            told = self._bounded(lambda: self.llm.collective_rpc("keel_load", args=(path, aliases, version)), "taking new weights")
        for worker in told:
            check_receipt(expected, worker["arrived"], worker["in_use"], aliases, version)
        self.unread = sorted((expected.keys() | aliases.keys()) - told[0]["in_use"].keys())

    def _stage(self, sent: Mapping[str, Tensor], path: str) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in sent.items()}, path)

    def _reset_prefix_cache(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def _check_fits(self, prompt: Prompt, sampling: Sampling) -> None:
        need = len(prompt.token_ids) + sampling.max_completion_tokens
        if not prompt.token_ids:
            raise KeelError(f"Prompt {prompt.id!r} has no token ids. Render it with the policy's template first.")
        if need > self.context:
            raise KeelError(
                f"Prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with max_completion_tokens "
                f"{sampling.max_completion_tokens} it needs {need}, and the context of this engine is {self.context}. "
                f"Shorten the prompt, lower sampling.max_completion_tokens, or raise engine.max_model_len (at most "
                f"{self.policy.context})."
            )

    def _completion(self, prompt: Prompt, sample: int, out: Any, sampling: Sampling) -> Completion:
        ids = list(out.token_ids)
        finish, error = read_finish(out.finish_reason)
        greedy = sampling.temperature == 0.0  # then all mass is on the token that was taken
        logp = [0.0 if greedy else step[token].logprob for step, token in zip(out.logprobs or [], ids, strict=True)]
        plain = ids[:-1] if finish == "stop" else ids
        asked, experts = (None, None)
        if self.settings.routed_experts:
            asked, experts = split_routing(out.routed_experts, len(prompt.token_ids), len(ids))
        return Completion(
            prompt_id=prompt.id,
            sample=sample,
            token_ids=torch.tensor(ids, dtype=torch.long),
            logp_rollout=torch.tensor(logp, dtype=torch.float32),
            finish=finish,
            text=self.policy.tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            versions=torch.full((len(ids),), self.version),
            sampled=torch.ones(len(ids), dtype=torch.bool),
            experts=experts,
            prompt_experts=asked,
            error=error,
        )

    def _bounded(self, call: Callable[[], T], what: str) -> T:
        """The call's answer, if it comes in time.

        Raises:
            KeelError: it failed or did not come; vLLM is then ended, for nobody knows what it still does.
        """
        if self.dead:
            raise KeelError(
                f"vLLM cannot go on with {what}: {self.dead}. Nothing trained is lost: `keel train --resume` starts it anew."
            )
        try:
            return within(call, self.settings.timeout_s)
        except TimeoutError:
            self.dead = f"it gave no answer within {self.settings.timeout_s:g} s while {what}"
            advice = "Raise engine.timeout_s if that was too short for a healthy one"
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            self.dead = f"it failed while {what} ({type(error).__name__}: {first})"
            advice = "Set VLLM_LOGGING_LEVEL=INFO to see what it says; if it was killed for memory, lower engine.kv_cache_gb"
            if isinstance(error, KeelError):
                raise
            self.close()
            raise KeelError(f"vLLM stopped: {self.dead}. Nothing trained is lost: `keel train --resume`. {advice}.") from error
        self.close()
        raise KeelError(f"vLLM stopped: {self.dead}. Nothing trained is lost: `keel train --resume`. {advice}.")
