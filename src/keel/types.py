"""The nouns of the house: Prompt, Completion, Score, Group, Batch, StepCounts.

Frozen, and with their shapes in their types. B completions in a batch, T tokens of the longest completion, L tokens of the
longest prompt + completion, P prompts. Everything that is "per token" is aligned to *completion* tokens: column t of a
[B, T] array speaks of the t-th token after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Prompt:
    """One question, as the task wrote it and as the model reads it.

    Args:
        id: unique per prompt *instance* of the data set; groups are formed by it, never by text or position.
        text: the question before any template.
        answer: the gold answer that the task's reward compares with.
        token_ids: the rendered prompt; empty until a template has rendered it (`models.templates.render`).
        data: whatever else the task wants to see again when it grades (difficulty tier, source row …).
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def again(self, number: int) -> Prompt:
        """The same question as another instance: groups of the two stay apart."""
        return replace(self, id=f"{self.id}@{number}")


def row_of(prompt_id: str) -> str:
    """The id of the data set's own row, of which a prompt may be a repeat (`Prompt.again`)."""
    row, _, number = prompt_id.rpartition("@")
    return row if row and number.isdigit() else prompt_id


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from.

    Args:
        temperature: logits are divided by it, in the engine and in the trainer alike. 0 is greedy (evaluation only).
        top_p, top_k, min_p: truncation of that distribution; 1.0, 0 and 0.0 switch them off.
        max_completion_tokens: a completion that reaches it without an end token finishes with "length".
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_completion_tokens: int = 256

    @property
    def truncated(self) -> bool:
        """Whether some tokens of the vocabulary cannot be sampled."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True)
class Completion:
    """What an engine returned for one sample of one prompt: the very token ids that were sampled, never a re-tokenisation.

    Args:
        prompt_id: of the prompt it answers.
        sample: index within its prompt's samples.
        token_ids: [T], the end token included when it was sampled.
        logp_rollout: [T] nats, under the distribution that each token was sampled from (temperature and truncation applied).
        finish: "stop" (an end token was sampled), "length" (the cap was reached) or "error" (with `error` saying why).
        text: the decoded completion without its end token.
        versions: [T], the weights' version that sampled each token.
        sampled: [T], True where the policy sampled the token; False for tool or environment tokens.
        kept: [T, V] bool or None: tokens that truncation left; None when sampling was not truncated.
        experts: [T, layers, top_k] or None: experts that an MoE engine sent each token to; −1 where unknown. The last token was
            sampled and never passed through the engine, so its experts always are.
        prompt_experts: [prompt, layers, top_k] or None: the same of the prompt's tokens.
        error: why the engine failed, where finish is "error".
    """

    prompt_id: str
    sample: int
    token_ids: Int[Tensor, " T"]
    logp_rollout: Float[Tensor, " T"]
    finish: Finish
    text: str
    versions: Int[Tensor, " T"]
    sampled: Bool[Tensor, " T"]
    kept: Bool[Tensor, "T V"] | None = None
    experts: Int[Tensor, "T layers top_k"] | None = None
    prompt_experts: Int[Tensor, "prompt layers top_k"] | None = None
    error: str = ""


@dataclass(frozen=True)
class Score:
    """A reward's verdict on one completion.

    Args:
        value: the reward, or None when the completion could not be scored; `reason` then says why. Unscorable is not zero.
        correct: whether the answer is right, apart from any shaping (accuracy, the dynamic-sampling filter, pass@k use it).
        parts: named parts of the value, kept for the record. What a part without a dot in its name says was added to the value; one
            with a dot ("point.units", "answer.point.units") is a detail.
        said: what the grader took for the completion's answer; "" where it takes none out of it. For the record: scores are equal
            whatever was said.
    """

    value: float | None
    correct: bool = False
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    said: str = field(default="", compare=False)

    @property
    def scorable(self) -> bool:
        return self.value is not None


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, with their scores in the same order."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers among scorable completions; NaN when none is scorable."""
        verdicts = [score.correct for score in self.scores if score.scorable]
        return sum(verdicts) / len(verdicts) if verdicts else float("nan")

    @property
    def live(self) -> bool:
        """Whether right and wrong completions are both present: only then does a centred advantage differ from zero."""
        return 0.0 < self.accuracy < 1.0


@dataclass(frozen=True)
class StepCounts:
    """Denominators of one optimizer step, over all its micro-batches and all ranks; taken before anything is cut.

    Tensors without dimensions, so that counting waits for no device and ranks can sum them. Only trained completions count:
    scorable ones that shaping did not filter out, and their trained tokens.

    Args:
        tokens, completions, prompts: totals.
        positive_tokens, negative_tokens: tokens of completions with advantage > 0 and < 0 (balanced aggregation).
        max_tokens: the length cap, the divisor of constant-length aggregation.
        positive_completions, negative_completions: completions with advantage > 0 and < 0.
        group_tokens, group_completions: [P] trained tokens and completions of each group, indexed by group id.
    """

    tokens: Int[Tensor, ""]
    completions: Int[Tensor, ""]
    prompts: Int[Tensor, ""]
    positive_tokens: Int[Tensor, ""]
    negative_tokens: Int[Tensor, ""]
    max_tokens: int
    positive_completions: Int[Tensor, ""]
    negative_completions: Int[Tensor, ""]
    group_tokens: Int[Tensor, " P"]
    group_completions: Int[Tensor, " P"]


@dataclass(frozen=True)
class Batch:
    """Completions as right-padded tensors. Masked is absent: whatever stands under a False mask changes no bit of any output.

    Args:
        tokens: [B, L] prompt + completion, right-padded (the padding value means nothing).
        prompt_len: [B] tokens of the prompt.
        completion_len: [B] tokens of the completion.
        mask: [B, T] True on trained tokens (sampled by the policy, of a scorable completion).
        logp_rollout: [B, T] the engine's own log-probabilities.
        group: [B] group index, 0 … P−1 in any order; groups may differ in size.
        reward: [B]; NaN where unscorable.
        scorable: [B].
        correct: [B].
        truncated: [B] finish was "length".
        versions: [B, T].
        logp_old: [B, T] or None: the trainer at the sampling weights.
        logp_ref: [B, T] or None: the reference model.
        kept: [B, T, V] bool or None: sampling mask to replay.
        experts: [B, L, layers, top_k] or None: routing to replay, of prompt and completion; −1 is unknown, and chosen anew.
        experts_rollout: the same, as the engine chose.
        experts_old: the same, as the trainer at the sampling weights would choose by itself.
    """

    tokens: Int[Tensor, "B L"]
    prompt_len: Int[Tensor, " B"]
    completion_len: Int[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    logp_rollout: Float[Tensor, "B T"]
    group: Int[Tensor, " B"]
    reward: Float[Tensor, " B"]
    scorable: Bool[Tensor, " B"]
    correct: Bool[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
    versions: Int[Tensor, "B T"]
    logp_old: Float[Tensor, "B T"] | None = None
    logp_ref: Float[Tensor, "B T"] | None = None
    kept: Bool[Tensor, "B T V"] | None = None
    experts: Int[Tensor, "B L layers top_k"] | None = None
    experts_rollout: Int[Tensor, "B L layers top_k"] | None = None
    experts_old: Int[Tensor, "B L layers top_k"] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Int[Tensor, " b"]) -> Batch:
        """The same batch with only these rows, in this order; padding is kept as it is."""
        picked = {name: value[index] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; itself where it is there already."""
        if self.tokens.device == torch.device(device):
            return self
        return replace(self, **{name: v.to(device) for name, v in vars(self).items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True)
class Claim:
    """A statement about the expected update of an objective, which enumeration can check.

    Args:
        says: "unbiased", the update is the truth's gradient; "scaled", a multiple of it; "mixture", some combination of the
            gradients of its terms; "zero", no update; "biased", not always a multiple of it: one world that shows it is enough.
        truth: what is ascended, a sum of names that `keel.exact.truths` knows, for instance "J - 0.05 reverse_kl"; "0" is nothing.
        conditions: knobs of the world under which it holds (`keel.exact.world.Setting`), for instance {"drift": 0.3}.
        factor: of "scaled", its value by name, for instance "(G-1)/G"; "" is any positive one.
        tolerance: relative norm of the bias that still counts as none; for "biased" the least that must be seen.
        because: the reason, in a phrase, for those who read the certificate.
    """

    says: Literal["unbiased", "scaled", "mixture", "zero", "biased"]
    truth: str = "0"
    conditions: Mapping[str, Any] = field(default_factory=dict)
    factor: str = ""
    tolerance: float = 1e-10
    because: str = ""

    def __post_init__(self):
        if self.says == "biased" and self.tolerance == 1e-10:
            object.__setattr__(self, "tolerance", 1e-2)
