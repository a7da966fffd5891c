"""Training on stored batches: the same completions for one process and for several."""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from keel.config import RunConfig  # noqa: E402
from keel.models.load import silence  # noqa: E402
from keel.models.lora import LoraConfig, wrap  # noqa: E402
from keel.models.policy import Policy  # noqa: E402
from keel.models.templates import Template  # noqa: E402
from keel.objectives.recipes import recipe  # noqa: E402
from keel.rollout.local import LocalEngine  # noqa: E402
from keel.tasks.task import get_task  # noqa: E402
from keel.training.buffer import Collected  # noqa: E402
from keel.training.loop import Trainer, iterate  # noqa: E402
from keel.training.ranks import ALONE  # noqa: E402
from keel.types import Completion, Group, Prompt, Score  # noqa: E402

from conftest import char_tokenizer, tiny_model  # noqa: E402  # last: what comes after it is checked at run time

CAP = 9


def groups_of(sizes, seed):
    """Groups of these sizes: random tokens and log-probabilities; some unscorable, never all of a group."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def completion(prompt_id, sample):
        length = draw(1, CAP + 1)
        ids = torch.randint(2, 8, (length,), generator=generator)
        stops = length < CAP
        ids[-1] = 1 if stops else ids[-1]
        return Completion(
            prompt_id=prompt_id, sample=sample, token_ids=ids, logp_rollout=-3 * torch.rand(length, generator=generator) - 2,
            finish="stop" if stops else "length", text="", versions=torch.zeros(length, dtype=torch.long),
            sampled=torch.ones(length, dtype=torch.bool),
        )  # fmt: skip

    def score(sample):
        right = sample % 2 == 0 if sample < 2 else draw(0, 2) == 1
        return Score(None, reason="for the test") if sample > 1 and draw(0, 5) == 0 else Score(float(right), correct=right)

    groups = []
    for number, size in enumerate(sizes):
        prompt = Prompt(f"{seed}-{number}", "", "", tuple(draw(2, 60) for _ in range(draw(2, 7))))
        groups.append(Group(prompt, *(tuple(map(f, range(size))) for f in (lambda s, p=prompt: completion(p.id, s), score))))
    return groups


class Stored:
    """Rollouts that were made before."""

    def __init__(self, batches, first=0):
        self.batches, self.place = batches, first

    def collect(self, step):
        groups = self.batches[self.place]
        self.place += 1
        return Collected(groups, sum(len(c.token_ids) for group in groups for c in group.completions), 0)

    def publish(self, weights, version): ...

    def close(self): ...


def make_policy(kind="qwen3", double=True, lora=False, **computing):
    model = silence(tiny_model(kind))
    if lora:
        model = wrap(model, LoraConfig(rank=4), seed=3)
    model = model.double() if double else model
    return Policy(model, char_tokenizer(), Template("none"), frozenset({1}), f"test-{kind}", **computing)


TASK = get_task("arithmetic:easy")


def trainer_of(policy, name, batches, ranks=ALONE, **train):
    settings = dict(updates_per_batch=1, lr=3e-3, micro_batch_tokens=40, weight_decay=0.01, group_size=4) | train
    config = RunConfig(recipe=name, steps=len(batches), train=settings, sampling={"max_completion_tokens": CAP}).resolved()
    trainer = Trainer(policy, LocalEngine(policy), TASK, recipe(name), config, ranks)
    trainer._rollouts = Stored(batches)
    return trainer


def trained(trainer, steps=None):
    """Weights after so many steps (all), and the steps' records."""
    records = []
    for record in iterate(trainer):
        records.append(dataclasses.replace(record, groups=()))
        if len(records) == steps:
            break
    return {name: tensor.clone() for name, tensor in trainer.policy.weights().items()}, records
