"""TRL's side: a real GRPOTrainer runs its own loop; a callback holds it before each optimizer step until the parent says go."""

from __future__ import annotations

import tempfile
import time
import warnings

from player import Channel
from works import LEARNING_RATE, MAX_GRAD_NORM, SEED, Given, Work, give, prompt_texts


def play(channel: Channel, work: Work, rows: int, steps: int) -> None:
    """Train `steps` optimizer steps with micro-batches of `rows` completions."""
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3
    from trl import GRPOTrainer

    channel.baseline()
    given = give(work, steps)
    given.policy.model.generation_config.eos_token_id = sorted(given.policy.end_ids)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=given.policy.model,
            reward_funcs=reward_function(given),
            args=configuration(work, rows, steps, folder),
            train_dataset=dataset(given),
            processing_class=given.policy.tokenizer,
        )
        refuse_other_work(trainer, given)
        clock = Clock(trainer)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(hold(channel, clock))
        channel.ready(micro_batch_rows=rows, attention=given.policy.model.config._attn_implementation)
        trainer.train()
        channel.wait()


def configuration(work: Work, rows: int, steps: int, folder: str):
    """TRL's settings for the same work, at its fastest: fp32, no checkpointing, no reference model, no logging, fused AdamW.

    `loss_type="dr_grpo"` with `scale_rewards="none"` is a constant-length aggregation of centred rewards. With one iteration TRL
    takes its own log-probabilities as the old ones and runs no extra forward pass.
    """
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=work.device == "cpu",
        bf16=work.dtype == "bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.completions // rows,
        num_generations=work.group_size,
        max_completion_length=work.cap,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        max_steps=steps,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
    )


def dataset(given: Given):
    """Prompts as text, in the order in which keel's stream hands them out; `place` finds the prompt again for its reward."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompt_texts(given), "place": list(range(len(given.prompts)))})


def reward_function(given: Given):
    """The task's own reward, in the form that TRL calls."""
    ends = given.policy.end_ids

    def reward(prompts, completions, completion_ids, place, **_):
        finish = ["stop" if ids[-1] in ends else "length" for ids in completion_ids]
        rows = zip(place, completions, finish, strict=True)
        return [given.task.reward(given.prompts[at], text, how).value for at, text, how in rows]

    return reward


def refuse_other_work(trainer, given: Given) -> None:
    """The same end tokens, cache on, dropout off, no reference model: or the comparison would not be one."""
    if set(trainer.eos_token_ids) != set(given.policy.end_ids):
        raise RuntimeError(f"TRL stops at {trainer.eos_token_ids} and keel at {sorted(given.policy.end_ids)}; expected the same.")
    if trainer.ref_model is not None or trainer.generation_config.use_cache is False:
        raise RuntimeError("TRL holds a reference model, or generates without a cache; expected neither.")


class Clock:
    """Seconds that TRL spends in rollout and in training, read around its own methods, which do what they did."""

    def __init__(self, trainer):
        self.rollout_s = self.step_s = 0.0
        self.tokens = 0
        generate, training_step = trainer._generate_and_score_completions, trainer.training_step

        def timed_generate(*arguments, **named):
            begin = time.perf_counter()
            out = generate(*arguments, **named)
            self.rollout_s += time.perf_counter() - begin
            self.tokens += int(out["completion_mask"].sum())
            return out

        def timed_step(*arguments, **named):
            begin = time.perf_counter()
            out = training_step(*arguments, **named)
            self.ended = time.perf_counter()
            self.step_s += self.ended - begin
            return out

        trainer._generate_and_score_completions, trainer.training_step = timed_generate, timed_step

    def updated(self) -> None:
        """The optimizer has stepped: what passed since the last backward pass was clipping and the update."""
        self.step_s += time.perf_counter() - self.ended

    def read(self) -> dict[str, float]:
        told = dict(rollout_s=self.rollout_s, train_s=self.step_s - self.rollout_s, tokens=self.tokens)
        self.rollout_s, self.step_s, self.tokens = 0.0, 0.0, 0
        return told


def hold(channel: Channel, clock: Clock):
    """The callback that waits for the parent before each optimizer step and reports after it."""
    from transformers import TrainerCallback

    class Hold(TrainerCallback):
        def on_step_begin(self, *_, **__):
            channel.wait()

        def on_optimizer_step(self, *_, **__):
            clock.updated()

        def on_step_end(self, *_, **__):
            channel.done(**clock.read())

    return Hold()
