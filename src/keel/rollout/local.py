"""The in-process engine: token in, token out, and exact.

Every completion's tokens depend on its own seed alone, not on its batch. What siblings have in common is computed once: the prompt,
and sampled prefixes too, because equal prefixes have equal next-token distributions. Finished completions leave the batch at once.

It can also be made inexact, on purpose: other number formats, stale weights, a temperature that the trainer does not know of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from keel.rollout.capture import cuda_graphs
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
        eager: on a CUDA card too, launch kernel by kernel; otherwise decoding steps are captured as graphs.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_branches: int = 512,
        numerics: Numerics = EXACT,
        sync_every: int = 1,
        hidden: Mapping[str, float] | None = None,
        eager: bool = False,
    ):
        compact = supports(policy.base.config)
        numerics.check(policy.name, compact, compact and Router.of(policy.base.config) is not None)
        self.policy, self.max_branches = policy, max_branches
        self.numerics, self.sync_every, self.hidden = numerics, sync_every, dict(hidden or {})
        self.noise = RouterNoise(numerics.router_noise) if numerics.router_noise else None
        self.captures = policy.device.type == "cuda" and compact and not eager and self.noise is None  # which is drawn on the host
        self.version, self.behind, self.held = -1, 0, {}
        self.renew: Callable[[], bool] | None = None  # asked between tokens: loads newer weights, if there are any
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
            record, inv_freq = cuda_graphs() if self.captures else None, base.model.rotary_emb.inv_freq
            self.forward = FusedForward(base.config, weights, inv_freq, self.numerics, self.noise, record)
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
        own = {"numerics": self.numerics.describe(), "sync_every": self.sync_every, "hidden": self.hidden}
        return plain | own | {"captured": self.captures}

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
        grown = _Grown(rows, cap)
        logits = self.forward.start([p.token_ids for p in prompts], rows, cap)
        vocabulary = logits.shape[1]
        asked = self.forward.prompt_experts  # one table a prompt, which its completions share
        row = torch.arange(rows)  # rows still growing, and the branch that each one follows
        branch = row // group_size
        for t in range(cap):
            token, logp, kept = _drawn(logits, sampling, branch, uniform[row, t])
            grown.add(t, row, token, logp, self.version, kept)
            going = ~torch.isin(token, ends)
            row, branch, token = row[going], branch[going], token[going]
            if len(row) == 0 or t + 1 == cap:
                break
            key, first, follows = np.unique((branch * vocabulary + token).numpy(), return_index=True, return_inverse=True)
            if self.renew is not None and self.renew():  # other weights: what was written so far is read anew
                written = [(*prompts[r // group_size].token_ids, *grown.tokens[r, : t + 1].tolist()) for r in row[first].tolist()]
                logits = self.forward.start(written, len(row), cap - t - 1)
                read = None if asked is None else torch.stack([table[-1] for table in self.forward.prompt_experts])
            else:
                parents, next_token = np.divmod(key, vocabulary)
                logits, read = self.forward.advance(parents, torch.from_numpy(next_token).to(logits.device)), self.forward.experts
            branch = torch.from_numpy(follows)
            if read is not None:
                grown.experts.append((row, read[branch]))
        self.forward.finish()
        finished = torch.isin(grown.tokens[torch.arange(rows), grown.length - 1], ends)
        return self._completions(prompts, group_size, grown, finished, asked)

    def _completions(self, prompts, group_size: int, grown: _Grown, finished: Tensor, asked) -> list[Completion]:
        ids, lengths, stops = grown.tokens.tolist(), grown.length.tolist(), finished.tolist()
        plain = [ids[r][: n - 1] if stop else ids[r][:n] for r, (n, stop) in enumerate(zip(lengths, stops, strict=True))]
        texts = _decode(self.policy.tokenizer, plain)
        kept, experts = grown.kept_table(), None if asked is None else grown.expert_table(asked[0])
        return [
            Completion(
                prompt_id=prompts[r // group_size].id,
                sample=r % group_size,
                token_ids=grown.tokens[r, :n].clone(),
                logp_rollout=grown.logp[r, :n].clone(),
                finish="stop" if stop else "length",
                text=texts[r],
                versions=grown.versions[r, :n].clone(),
                sampled=torch.ones(n, dtype=torch.bool),
                kept=None if kept is None else kept[r, :n].clone(),
                experts=None if experts is None else experts[r, :n].clone(),
                prompt_experts=None if asked is None else asked[r // group_size],
            )
            for r, (n, stop) in enumerate(zip(lengths, stops, strict=True))
        ]


def _drawn(logits: Tensor, sampling: Sampling, branch: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token of each row, its log-probability, and the row's kept set (None when nothing is cut off): drawn where the logits
    are, for only these are small.
    """
    branch = branch.to(logits.device)
    log_probs, kept = distribution(logits, sampling)
    token = draw(log_probs, branch, uniform.to(logits.device))
    return token.cpu(), log_probs[branch, token].float().cpu(), None if kept is None else kept[branch].cpu()


class _Grown:
    """What has been sampled so far: one row for each completion, one column for each token."""

    def __init__(self, rows: int, cap: int):
        self.tokens, self.versions = (torch.zeros(rows, cap, dtype=torch.long) for _ in range(2))
        self.logp, self.length = torch.zeros(rows, cap), torch.zeros(rows, dtype=torch.long)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.experts: list[tuple[Tensor, Tensor]] = []  # those of column t are known once it was read, a step later

    def add(self, t: int, row: Tensor, token: Tensor, logp: Tensor, version: int, kept: Tensor | None) -> None:
        """Column t of these rows."""
        self.tokens[row, t], self.logp[row, t], self.versions[row, t] = token, logp, version
        self.length[row] = t + 1
        if kept is not None:
            self.kept.append((row, kept))

    def kept_table(self) -> Tensor | None:
        """The kept sets as one [rows, longest, V]; None where nothing was cut off."""
        return self._table(self.kept, self.kept[0][1], 0) if self.kept else None

    def expert_table(self, like: Tensor) -> Tensor:
        """Experts as one [rows, longest, layers, k]; unknown for a token that was never read: a last one."""
        return self._table(self.experts, like, UNKNOWN)

    def _table(self, steps: Sequence[tuple[Tensor, Tensor]], like: Tensor, fill: int) -> Tensor:
        out = like.new_full((len(self.length), int(self.length.max()), *like.shape[1:]), fill)
        for t, (row, value) in enumerate(steps):
            out[row, t] = value
        return out


def _decode(tokenizer, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts as they were written, special tokens and spaces included; straight from the fast tokenizer where there is one."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _twin(base, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None):
    """A second model of the same architecture that holds these weights."""
    with torch.device(base.device):
        twin = type(base)(base.config).to(dtype or base.dtype).eval()
    twin.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=False)
    twin.tie_weights()
    return twin
