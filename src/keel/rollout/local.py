"""The in-process engine: token in, token out, and exact.

Every completion's tokens depend on its own seed alone, not on its batch. What siblings have in common is computed once: the prompt,
and sampled prefixes too, because equal prefixes have equal next-token distributions. Finished completions leave the batch at once.

It can also be made inexact, on purpose: other number formats, stale weights, a temperature that the trainer does not know of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from keel.errors import KeelError
from keel.models.checksum import check_complete
from keel.models.decoder import Router, supports
from keel.models.lora import plain_shapes
from keel.models.policy import Policy
from keel.models.routing import UNKNOWN
from keel.rollout.engine import Seed, checksum
from keel.rollout.numerics import EXACT, Numerics, RouterNoise
from keel.rollout.sampling import distribution, draw, uniforms
from keel.rollout.serving import FusedForward, TransformersForward
from keel.types import Completion, Prompt, Sampling


class LocalEngine:
    """Samples from its own copy of a policy's weights.

    Args:
        policy: gives the architecture, tokenizer and end tokens; its weights are loaded as version 0.
        max_branches: completions sampled at once; more prompts are taken in turn.
        numerics: in which arithmetic it computes; the trainer's own unless given.
        sync_every: only every so many-th load is taken; tokens in between carry the version that truly sampled them.
        hidden: sampling parameters that it uses instead of those asked for, and does not tell: {"temperature": 0.7}.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_branches: int = 512,
        numerics: Numerics = EXACT,
        sync_every: int = 1,
        hidden: Mapping[str, float] | None = None,
    ):
        compact = supports(policy.base.config)
        numerics.check(policy.name, compact, compact and Router.of(policy.base.config) is not None)
        self.policy, self.max_branches = policy, max_branches
        self.numerics, self.sync_every, self.hidden = numerics, sync_every, dict(hidden or {})
        self.noise = RouterNoise(numerics.router_noise) if numerics.router_noise else None
        self.version, self.behind, self.held = -1, 0, {}
        self.take(policy.weights(), 0)

    @property
    def exact(self) -> bool:
        """Whether it samples from the trainer's policy, up to the last bits."""
        return self.numerics.exact and self.sync_every == 1 and not self.hidden

    def load(self, weights: Mapping[str, Tensor], version: int) -> str:
        """Take a copy of the weights, if it is time to; nothing computed under an older version survives.

        Returns:
            The checksum of what is now in use.

        Raises:
            KeelError: a tensor is missing or has another shape; it is named, and the old weights stay.
        """
        if self.behind + 1 < self.sync_every:
            check_complete(weights, plain_shapes(self.policy.base), self.version)
            self.behind += 1
            return self.checksum
        return self.take(weights, version)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor], version: int) -> str:
        """`load`, whether it is time to or not."""
        check_complete(weights, plain_shapes(self.policy.base), self.version)
        base = self.policy.base
        self.forward = None  # the old copy leaves before the new one is made: never two in memory
        if supports(base.config):
            self.forward = FusedForward(base.config, weights, base.model.rotary_emb.inv_freq, self.numerics, self.noise)
        else:
            self.forward = TransformersForward(_twin(base, self.numerics.weights(weights), self.numerics.dtype))
        self.version, self.behind, self.checksum = version, 0, checksum(weights)
        if self.sync_every > 1:
            self.held = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return self.checksum

    def sleep(self) -> None:
        """Drop the copy of the weights, unless it is used on: after an update it is stale, and training can use the memory."""
        if self.sync_every == 1:
            self.forward = None

    def describe(self) -> dict[str, object]:
        """For the manifest: which engine, and what it takes from nowhere but the run's own sampling parameters."""
        kind = type(self.forward).__name__
        plain = {"engine": "local", "forward": kind, "max_branches": self.max_branches, "generation_config": "ignored"}
        return plain | {"numerics": self.numerics.describe(), "sync_every": self.sync_every, "hidden": self.hidden}

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Seed, group_size: int) -> list[Completion]:
        """`group_size` completions of each prompt, in prompt order.

        Raises:
            KeelError: the engine sleeps, a prompt is empty, or prompt and cap exceed the model's context.
        """
        if self.forward is None:
            raise KeelError(f"The engine sleeps since version {self.version}. Call `load` with the weights to sample from first.")
        for prompt in prompts:
            self._check_fits(prompt, sampling)
        if self.noise is not None:
            self.noise.seed(seed.run, seed.step)
        at_once = max(1, self.max_branches // group_size)
        parts = [prompts[i : i + at_once] for i in range(0, len(prompts), at_once)]
        drawn = replace(sampling, **self.hidden)
        completions = [completion for part in parts for completion in self._generate(part, drawn, seed, group_size)]
        if drawn.truncated and not sampling.truncated:  # what is hidden is not told
            return [replace(completion, kept=None) for completion in completions]
        return completions

    def _check_fits(self, prompt: Prompt, sampling: Sampling) -> None:
        need = len(prompt.token_ids) + sampling.max_completion_tokens
        if not prompt.token_ids:
            raise KeelError(f"Prompt {prompt.id!r} has no token ids. Render it with the policy's template first.")
        if need > self.policy.context:
            raise KeelError(
                f"Prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with max_completion_tokens "
                f"{sampling.max_completion_tokens} it needs {need}, and the context of {self.policy.name!r} is "
                f"{self.policy.context}. Shorten the prompt or lower sampling.max_completion_tokens."
            )

    def _generate(self, prompts, sampling: Sampling, seed: Seed, group_size: int) -> list[Completion]:
        rows, cap = len(prompts) * group_size, sampling.max_completion_tokens
        uniform = uniforms([seed.row(p.id, sample) for p in prompts for sample in range(group_size)], cap)
        ends = torch.tensor(sorted(self.policy.end_ids))
        tokens = torch.zeros(rows, cap, dtype=torch.long)
        logp = torch.zeros(rows, cap)
        length = torch.zeros(rows, dtype=torch.long)
        kept_steps: list[tuple[Tensor, Tensor]] = []
        expert_steps: list[tuple[Tensor, Tensor]] = []
        logits = self.forward.start([p.token_ids for p in prompts], rows, cap)
        row = torch.arange(rows)  # rows still growing, and the branch that each one follows
        branch = row // group_size
        for t in range(cap):
            log_probs, kept = distribution(logits.cpu(), sampling)
            token = draw(log_probs, branch, uniform[row, t])
            tokens[row, t], logp[row, t] = token, log_probs[branch, token].float()
            length[row] = t + 1
            if kept is not None:
                kept_steps.append((row, kept[branch]))
            going = ~torch.isin(token, ends)
            row, branch, token = row[going], branch[going], token[going]
            if len(row) == 0 or t + 1 == cap:
                break
            key, follows = np.unique((branch * log_probs.shape[1] + token).numpy(), return_inverse=True)
            parents, next_token = np.divmod(key, log_probs.shape[1])
            logits = self.forward.advance(parents, torch.from_numpy(next_token).to(logits.device))
            branch = torch.from_numpy(follows)
            if self.forward.experts is not None:
                expert_steps.append((row, self.forward.experts[branch]))
        self.forward.finish()
        kept_all = _stack_kept(kept_steps, rows, int(length.max())) if kept_steps else None
        finished = torch.isin(tokens[torch.arange(rows), length - 1], ends)
        asked = self.forward.prompt_experts  # one table a prompt, which its completions share
        experts = None if asked is None else _stack_experts(expert_steps, rows, int(length.max()), asked[0])
        made = self._completions(prompts, group_size, tokens, logp, length, finished, kept_all)
        if experts is None:
            return made
        return [
            replace(c, experts=experts[r, : len(c.token_ids)].clone(), prompt_experts=asked[r // group_size])
            for r, c in enumerate(made)
        ]

    def _completions(self, prompts, group_size, tokens, logp, length, finished, kept) -> list[Completion]:
        ids, lengths, stops = tokens.tolist(), length.tolist(), finished.tolist()
        plain = [ids[r][: n - 1] if stop else ids[r][:n] for r, (n, stop) in enumerate(zip(lengths, stops, strict=True))]
        texts = _decode(self.policy.tokenizer, plain)
        return [
            Completion(
                prompt_id=prompts[r // group_size].id,
                sample=r % group_size,
                token_ids=tokens[r, :n].clone(),
                logp_rollout=logp[r, :n].clone(),
                finish="stop" if stop else "length",
                text=texts[r],
                versions=torch.full((n,), self.version),
                sampled=torch.ones(n, dtype=torch.bool),
                kept=None if kept is None else kept[r, :n].clone(),
            )
            for r, (n, stop) in enumerate(zip(lengths, stops, strict=True))
        ]


def _decode(tokenizer, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts as they were written, special tokens and spaces included; straight from the fast tokenizer where there is one."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _stack_kept(steps: Sequence[tuple[Tensor, Tensor]], rows: int, width: int) -> Tensor:
    """The kept sets of all steps as one [rows, width, V]."""
    out = torch.zeros(rows, width, steps[0][1].shape[-1], dtype=torch.bool)
    for t, (row, kept) in enumerate(steps):
        out[row, t] = kept
    return out


def _stack_experts(steps: Sequence[tuple[Tensor, Tensor]], rows: int, width: int, like: Tensor) -> Tensor:
    """Experts of all steps as one [rows, width, layers, k]; unknown where a token never passed through the engine: a last one."""
    out = like.new_full((rows, width, *like.shape[1:]), UNKNOWN)
    for t, (row, experts) in enumerate(steps):
        out[row, t] = experts
    return out


def _twin(base, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None):
    """A second model of the same architecture that holds these weights."""
    with torch.device(base.device):
        twin = type(base)(base.config).to(dtype or base.dtype).eval()
    twin.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=False)
    twin.tie_weights()
    return twin
