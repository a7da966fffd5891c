"""An engine that says what it was told to say, and fails where it was told to fail: for tests, examples and drills.

It keeps the whole `Engine` contract unless a fault is asked for, so a loop that is right runs on it in milliseconds,
and a loop's alarms can be heard ringing without a real engine going wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from keel.errors import KeelError, nearest
from keel.models.policy import Policy
from keel.rollout.engine import Seed, check_arrival, checksum
from keel.types import Batch, Completion, Prompt, Sampling

Answer = str | Sequence[int]
Script = Mapping[str, Answer | Sequence[Answer]] | Callable[[Prompt, int], Answer]
KINDS = {
    "raise": "generate raises RuntimeError, as a crashed engine does",
    "error": "the completion comes back with finish 'error'",
    "drop": "the completion is left out",
    "swap": "the completion and the next one answer each other's prompts, under their own names",
    "stale": "the completion says that the weights before these sampled it",
    "raw_logp": "its log-probabilities are those at temperature 1, whatever the temperature was",
    "lose_tensor": "load leaves out the tensor named `tensor`, and says by its checksum what it has",
}


@dataclass(frozen=True)
class Fault:
    """One thing to go wrong.

    Args:
        kind: a key of `KINDS`, which says what each does.
        step: at which seed's step (for "lose_tensor": at which version); None at every one.
        place: of the completion among all that the call returns.
        tensor: that is lost.
    """

    kind: str
    step: int | None = None
    place: int = 0
    tensor: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise KeelError(f"Unknown fault {self.kind!r}: {nearest(self.kind, KINDS)}Known are {', '.join(KINDS)}.")

    def due(self, step: int) -> bool:
        return self.step is None or self.step == step


class ScriptedEngine:
    """Completions from a script.

    Args:
        policy: whose tokenizer and end tokens write the script down, and whose live weights give log-probabilities.
        script: prompt id → what to say, or a function of (prompt, sample). A text is tokenised and ended with an end
            token; token ids are taken as they are; of several, sample i takes number i, beginning again after the last.
            Whatever is longer than the cap is cut there and finishes with "length".
        logp: "policy", or one constant for every token, in nats.
        faults: what goes wrong, and when.

    >>> engine = ScriptedEngine(policy, {"sum-1": ["A:42", "A:41"]})            # half right
    >>> engine = ScriptedEngine(policy, lambda prompt, sample: prompt.answer)   # always right
    >>> engine = ScriptedEngine(policy, script, faults=[Fault("drop", step=3)])
    """

    def __init__(
        self,
        policy: Policy,
        script: Script,
        *,
        logp: Literal["policy"] | float = "policy",
        faults: Sequence[Fault] = (),
    ):
        self.policy, self.script, self.logp, self.faults = policy, script, logp, tuple(faults)
        self.version = 0

    def load(self, weights: Mapping[str, Tensor], version: int) -> str:
        """Check that these are the policy's weights, for those are what log-probabilities are computed with.

        Raises:
            KeelError: a tensor is missing or is not the policy's; it is named.
        """
        lost = {fault.tensor for fault in self.faults if fault.kind == "lose_tensor" and fault.due(version)}
        if not lost:
            check_arrival(self.policy.weights(), weights, version)
        self.version = version
        return checksum({name: tensor for name, tensor in weights.items() if name not in lost})

    def sleep(self) -> None:
        """Nothing: it holds no weights of its own."""

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        faults = [f"{fault.kind}@{'*' if fault.step is None else fault.step}" for fault in self.faults]
        return {"engine": "scripted", "logp": self.logp, "faults": faults, "generation_config": "ignored"}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Seed, group_size: int) -> list[Completion]:
        """`group_size` scripted completions of each prompt, prompt-major. The seed's step decides which faults are due.

        Raises:
            KeelError: the script has nothing for a prompt, or sampling is truncated, for which it has no kept sets.
        """
        if sampling.truncated:
            raise KeelError("A script has no kept sets to replay, so it cannot stand for truncated sampling. Set top_p=1.")
        due = [fault for fault in self.faults if fault.due(seed.step)]
        if any(fault.kind == "raise" for fault in due):
            raise RuntimeError(f"ScriptedEngine fails at step {seed.step}, as its faults ask")
        places = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        ids = [self._ids(prompt, sample)[: sampling.max_completion_tokens] for prompt, sample in places]
        logp = self._log_probs(places, ids, sampling.temperature)
        raw = [fault.place for fault in due if fault.kind == "raw_logp"]
        if raw:
            plain = self._log_probs(places, ids, 1.0)
            logp = [plain[i] if i in raw else row for i, row in enumerate(logp)]
        completions = [self._completion(*place, *row) for place, *row in zip(places, ids, logp, strict=True)]
        return _spoil(completions, due)

    def _ids(self, prompt: Prompt, sample: int) -> list[int]:
        """What the script says here, as token ids."""
        if callable(self.script):
            said = self.script(prompt, sample)
        elif prompt.id in self.script:
            said = self.script[prompt.id]
            several = not isinstance(said, str) and not isinstance(said[0], int)
            said = said[sample % len(said)] if several else said
        else:
            raise KeelError(
                f"The script has nothing for prompt {prompt.id!r}: {nearest(prompt.id, self.script)}It has "
                f"{len(self.script)} entries. Add one, or give a function of (prompt, sample)."
            )
        if not isinstance(said, str):
            return list(said)
        own = self.policy.tokenizer.eos_token_id
        end = own if own in self.policy.end_ids else min(self.policy.end_ids)
        return [*self.policy.tokenizer(said, add_special_tokens=False).input_ids, end]

    def _log_probs(self, places, ids: Sequence[Sequence[int]], temperature: float) -> list[Tensor]:
        """Log-probabilities of each completion's tokens, in nats."""
        if self.logp != "policy":
            return [torch.full((len(row),), float(self.logp)) for row in ids]
        if temperature == 0:
            return [torch.zeros(len(row)) for row in ids]  # greedy: what was said had all the mass
        with torch.no_grad():
            logp = self.policy.logp(_batch([prompt for prompt, _ in places], ids), temperature=temperature).logp
        return [row[: len(tokens)].float().cpu() for row, tokens in zip(logp, ids, strict=True)]

    def _completion(self, prompt: Prompt, sample: int, ids: Sequence[int], logp: Tensor) -> Completion:
        stopped = ids[-1] in self.policy.end_ids
        plain = ids[:-1] if stopped else ids
        return Completion(
            prompt_id=prompt.id,
            sample=sample,
            token_ids=torch.tensor(ids),
            logp_rollout=logp,
            finish="stop" if stopped else "length",
            text=self.policy.tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            versions=torch.full((len(ids),), self.version),
            sampled=torch.ones(len(ids), dtype=torch.bool),
        )


def _spoil(completions: list[Completion], due: Sequence[Fault]) -> list[Completion]:
    """The completions after everything that was asked to go wrong has gone wrong; rows are left out last."""
    out = list(completions)
    for fault in due:
        i = fault.place
        if fault.kind == "error":
            out[i] = replace(out[i], finish="error", error="scripted failure", text="")
        if fault.kind == "stale":
            out[i] = replace(out[i], versions=out[i].versions - 1)
        if fault.kind == "swap":
            names = [dict(prompt_id=c.prompt_id, sample=c.sample) for c in out[i : i + 2]]
            out[i], out[i + 1] = replace(out[i + 1], **names[0]), replace(out[i], **names[1])
    dropped = {fault.place for fault in due if fault.kind == "drop"}
    return [c for i, c in enumerate(out) if i not in dropped]


def _batch(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> Batch:
    """Prompts and completions as a batch that `Policy.logp` reads; rewards are NaN."""
    rows = [torch.tensor([*prompt.token_ids, *tokens]) for prompt, tokens in zip(prompts, ids, strict=True)]
    length = torch.tensor([len(tokens) for tokens in ids])
    inside = torch.arange(int(length.max())) < length[:, None]
    blank = torch.zeros(len(ids), dtype=torch.bool)
    return Batch(
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_len=torch.tensor([len(prompt.token_ids) for prompt in prompts]),
        completion_len=length,
        mask=inside,
        logp_rollout=torch.zeros(inside.shape),
        group=torch.zeros(len(ids), dtype=torch.long),
        reward=torch.full((len(ids),), float("nan")),
        scorable=blank,
        correct=blank,
        truncated=blank,
        versions=torch.zeros(inside.shape, dtype=torch.long),
    )
