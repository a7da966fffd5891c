"""keel's side: the training loop that `keel train` runs, one StepRecord each time the parent says go."""

from __future__ import annotations

import warnings

from player import Channel
from works import LEARNING_RATE, MAX_GRAD_NORM, SEED, Work, give


def play(channel: Channel, work: Work, micro_batch_tokens: int | None, steps: int) -> None:
    """Train `steps` optimizer steps with micro-batches of at most `micro_batch_tokens` tokens (None: no cut)."""
    warnings.simplefilter("ignore")
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from keel.objectives.recipes import recipe
    from keel.rollout.local import LocalEngine
    from keel.training.loop import Trainer, iterate

    channel.baseline()
    given = give(work, steps)
    settings = configuration(work, micro_batch_tokens, steps)
    trainer = Trainer(given.policy, LocalEngine(given.policy), given.task, recipe("solid"), settings)
    records = iterate(trainer)
    channel.ready(micro_batch_tokens=micro_batch_tokens, longest_prompt=given.longest_prompt)
    for _ in range(steps):
        channel.wait()
        told = next(records).metrics
        channel.done(told["time/rollout_s"], told["time/train_s"], int(told["tokens/batch"]))
    channel.wait()


def configuration(work: Work, micro_batch_tokens: int | None, steps: int):
    """keel's settings for the work; everything that is not named here keeps its default."""
    from keel.config import RunConfig

    return RunConfig(
        recipe="solid",
        model=work.model,
        task=work.task,
        seed=SEED,
        steps=steps,
        sampling={"temperature": 1.0, "max_completion_tokens": work.cap},
        train={
            "prompts_per_step": work.prompts,
            "group_size": work.group_size,
            "lr": LEARNING_RATE,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": MAX_GRAD_NORM,
            "micro_batch_tokens": micro_batch_tokens,
            "probe_every": work.probe_every,
            "device": work.device,
            "dtype": work.dtype,
        },
    )
