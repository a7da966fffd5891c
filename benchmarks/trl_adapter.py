"""Does a recipe learn the same inside TRL's trainer as in keel's own loop? Real training in both, paired by seed.

    python benchmarks/trl_adapter.py --seeds 8        # three recipes, 50 steps of 8 prompts × 4; writes build/trl-adapter.json

Both begin with the same weights and take the same prompts in the same order; their samplers draw different numbers. Compared is
the mean training reward of all steps, and of the last twenty: for each, the paired difference over seeds with its t interval,
and Holm's correction over all comparisons. A difference that seeds could not hide would leave zero outside of an interval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from works import Given, Work, give, prompt_texts

RECIPES = {"solid": 1, "grpo": 1, "dapo": 2}  # with the updates that one rollout batch is used for
STEPS, LAST, RATE = 50, 20, 3e-4
WORK = Work("adapter", "tiny-dense", "arithmetic:medium", 8, 4, 24, trl_rows=32, keel_tokens=None, pairs=1)


def main() -> None:
    """Train everything, print a line for each comparison, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("build/trl-adapter.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    curves = {name: [pair(name, seed) for seed in range(options.seeds)] for name in options.recipes}
    rows = compare(curves)
    for row in rows:
        print(row["text"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"steps": STEPS, "rows": rows, "curves": curves}, indent=1) + "\n")


def pair(name: str, seed: int) -> dict[str, list[float]]:
    """The two curves of one seed: mean reward of each step's completions."""
    begin = time.perf_counter()
    curves = {side: play(name, seed) for side, play in (("keel", in_keel), ("trl", in_trl))}
    told = {side: sum(curve[-LAST:]) / LAST for side, curve in curves.items()}
    print(f"{name} seed {seed}: keel {told['keel']:.3f}, TRL {told['trl']:.3f} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return curves


def in_keel(name: str, seed: int) -> list[float]:
    """keel's own loop."""
    from keel.config import RunConfig
    from keel.objectives.recipes import recipe
    from keel.rollout.local import LocalEngine
    from keel.training.loop import Trainer, iterate

    given = give(WORK, STEPS, seed)
    config = RunConfig(
        recipe=name,
        model=WORK.model,
        task=WORK.task,
        seed=seed,
        steps=STEPS,
        sampling={"max_completion_tokens": WORK.cap},
        train={
            "prompts_per_step": WORK.prompts,
            "group_size": WORK.group_size,
            "lr": RATE,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "updates_per_batch": RECIPES[name],
            "dynamic_sampling": False,
        },
    )
    trainer = Trainer(given.policy, LocalEngine(given.policy), given.task, recipe(name), config)
    groups = (record.groups for record in iterate(trainer))
    rewards = ([score.value for group in batch for score in group.scores] for batch in groups if batch)
    return spread([sum(batch) / len(batch) for batch in rewards], RECIPES[name])


def in_trl(name: str, seed: int) -> list[float]:
    """TRL's trainer with keel's objective."""
    import torch
    import transformers
    from datasets import Dataset

    from keel.integrations.trl import GRPOConfig, KeelGRPOTrainer

    torch.manual_seed(seed)
    given, curve = give(WORK, STEPS, seed), []
    given.policy.model.generation_config.eos_token_id = sorted(given.policy.end_ids)
    with tempfile.TemporaryDirectory() as folder:
        trainer = KeelGRPOTrainer(
            given.policy.model,
            reward_of(given, curve),
            GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
                disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=WORK.prompts * WORK.group_size,
                steps_per_generation=RECIPES[name], num_generations=WORK.group_size, max_completion_length=WORK.cap,
                learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
                max_steps=STEPS, shuffle_dataset=False, seed=seed,
            ),
            Dataset.from_dict({"prompt": prompt_texts(given), "place": list(range(len(given.prompts)))}),
            objective=name,
            processing_class=given.policy.tokenizer,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return spread(curve, RECIPES[name])


def reward_of(given: Given, curve: list[float]) -> Callable[..., list[float]]:
    """The task's own reward in the form that TRL calls; each call adds the batch's mean to the curve."""

    def reward(prompts, completions, completion_ids, place, **_):
        finish = ["stop" if ids[-1] in given.policy.end_ids else "length" for ids in completion_ids]
        rows = zip(place, completions, finish, strict=True)
        values = [given.task.reward(given.prompts[at], text, how).value for at, text, how in rows]
        curve.append(sum(values) / len(values))
        return values

    return reward


def spread(of_batches: list[float], updates: int) -> list[float]:
    """A value for each step: the one of the batch that it learns from."""
    return [value for value in of_batches for _ in range(updates)][:STEPS]


def compare(curves: dict[str, list[dict[str, list[float]]]]) -> list[dict]:
    """TRL less keel, for each recipe and part of the curve: mean, interval, standard deviation of seeds, corrected p."""
    import numpy as np
    from scipy import stats

    from keel.lab.statistics import holm, t_interval

    rows = []
    for name, pairs in curves.items():
        for part, first in (("all steps", 0), (f"last {LAST}", STEPS - LAST)):
            keel, trl = (np.array([np.mean(one[side][first:]) for one in pairs]) for side in ("keel", "trl"))
            low, high = t_interval(trl - keel)
            told = dict(keel=keel.mean(), trl=trl.mean(), low=low, high=high, seed_sd=keel.std(ddof=1))
            told["p"] = stats.ttest_rel(trl, keel).pvalue
            rows.append({"recipe": name, "part": part, **{key: float(value) for key, value in told.items()}})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
        row["text"] = (
            f"{row['recipe']:<6} {row['part']:<9} keel {row['keel']:.3f} ± {row['seed_sd']:.3f}, TRL {row['trl']:.3f}; "
            f"difference {row['trl'] - row['keel']:+.3f} (95 %: {row['low']:+.3f} – {row['high']:+.3f}), Holm's p {corrected:.2f}"
        )
    return rows


if __name__ == "__main__":
    main()
