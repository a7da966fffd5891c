"""The model card of a pretrained model: what it is, how it was made, and what it can do, measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.evaluate.suite import Graded, describe, grade
from keel.models.corpus import MIXTURES
from keel.rollout.engine import Seed
from keel.tasks.task import get_task
from keel.types import Sampling

TASKS = (
    "arithmetic:easy", "arithmetic:medium", "arithmetic:hard",
    "skills:subtract", "skills:sort", "skills:reverse", "skills:max",
)  # fmt: skip
PROMPTS, SAMPLES, SAMPLING, SEED = 256, 16, Sampling(max_completion_tokens=48), Seed(0, 0)


def write_card(folder: str | Path) -> dict[str, dict[str, float]]:
    """Measure the model in a folder that `pretrain` wrote, and write README.md beside it.

    Returns:
        task → its numbers: those of `suite.evaluate` with pass@16, and of sums also shown_frac (completions that show
        steps), pass@1_shown and pass@1_direct.

    Raises:
        KeelError: the folder holds no model.
    """
    folder = Path(folder)
    measured = measure(str(folder))
    report = json.loads((folder / "pretrain.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "README.md").write_text(card(report, config, measured))
    return measured


def measure(model: str, tasks: Sequence[str] = TASKS, prompts: int = PROMPTS) -> dict[str, dict[str, float]]:
    """task → numbers of a model at temperature 1 on held-out prompts; as `write_card` returns them."""
    from keel.models.load import load_policy
    from keel.rollout.local import LocalEngine

    policy = load_policy(model)
    engine, out = LocalEngine(policy), {}
    for task in map(get_task, tasks):
        asked = [policy.template.render(prompt, policy.tokenizer) for prompt in task.test[:prompts]]
        graded = grade(engine, asked, task, SAMPLING, SAMPLES, SEED)
        out[task.name] = describe(graded, (1, SAMPLES)) | (_forms(graded) if "+" in asked[0].text else {})
    return out


def _forms(graded: Sequence[Graded]) -> dict[str, float]:
    """Right answers among completions that show steps, and among those that do not."""
    pairs = [(c.text, s.correct) for row in graded for c, s in zip(row.completions, row.scores, strict=True)]
    shown = [right for text, right in pairs if "=" in text]
    direct = [right for text, right in pairs if "=" not in text]
    return {
        "shown_frac": len(shown) / len(pairs),
        "pass@1_shown": sum(shown) / max(1, len(shown)),
        "pass@1_direct": sum(direct) / max(1, len(direct)),
    }


def card(report: Mapping[str, Any], config: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]]) -> str:
    """The text of README.md.

    Args:
        report: of `pretrain`.
        config: of the model, as transformers wrote it.
        measured: of `measure`.
    """
    command = f"keel pretrain --size {report['size']} --kind {report['kind']} --seed {report['seed']} --out FOLDER"
    return CARD.format(
        license="apache-2.0", command=command, architecture=config["architectures"][0],
        parameters=f"{report['parameters']:,}", shape=_shape(config), steps=report["steps"], rows=report["rows"],
        seconds=round(report["seconds"]), threads=report["threads"], loss=report["loss"], kind=report["kind"],
        recipe="\n".join(map(_recipe, _phases(report["kind"]))), table=_table(measured), forms=_told(measured),
        prompts=PROMPTS, samples=SAMPLES, cap=SAMPLING.max_completion_tokens,
    )  # fmt: skip


def _phases(kind: str) -> list[str]:
    return ["base"] if kind == "base" else ["base", kind]


def _shape(config: Mapping[str, Any]) -> str:
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    text = f"hidden {width}, {layers} layers, {heads} heads of {config['head_dim']} ({config['num_key_value_heads']} kv), "
    if config.get("num_experts"):
        mlp = config["moe_intermediate_size"]
        return text + f"{config['num_experts']} experts of {mlp}, {config['num_experts_per_tok']} a token"
    return text + f"MLP {config['intermediate_size']}"


def _recipe(kind: str) -> str:
    mixture = MIXTURES[kind]
    total = sum(mixture.shares.values())
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in mixture.shares.items())
    return (
        f"- *{kind}*: {shares}. {mixture.worked:.0%} of the sums show their steps; {mixture.wrong:.0%} of the steps, "
        f"written down or not, and of the other answers are wrong."
    )


def _table(measured: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(
        f"| {name} | {m['prompts']:.0f} | {m['pass@1']:.3f} ({m['low']:.3f} – {m['high']:.3f}) | "
        f"{m[f'pass@{SAMPLES}']:.3f} | {m['length_mean']:.1f} | {m['truncated_frac']:.4f} |"
        for name, m in measured.items()
    )


def _told(measured: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(
        f"| {name} | {m['shown_frac']:.2f} | {m['pass@1_shown']:.3f} | {m['pass@1_direct']:.3f} |"
        for name, m in measured.items()
        if "shown_frac" in m
    )


CARD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
---
# A {parameters}-parameter {kind} model over characters

`{architecture}`: {shape}; 64 tokens, one a character; context 256; tied embeddings; fp32. It adds small numbers,
subtracts, sorts digits, reverses strings and finds the largest number, with mistakes: a base for experiments with
reinforcement learning, and of no other use. Prompts end with a line break, answers are `A:…` and an end token:

    Q:12+5+20=⏎            → A:37    or    12+5=17⏎17+20=37⏎A:37
    Q:31-14=⏎ → A:17       S:40291⏎ → A:01249       R:abcd⏎ → A:dcba       M:12,45,7⏎ → A:45

## How it was made

    {command}

{steps} steps of {rows} fresh examples with AdamW, {seconds} s with {threads} thread(s); final loss {loss} nats a token.
All data are generated (`keel/models/corpus.py`), and no held-out problem of any task below is among them:

{recipe}

## What it can do

By sampling at temperature 1, {samples} completions of each of the first {prompts} held-out prompts (or all of them), at
most {cap} tokens each, seed (0, 0). In brackets the 95 % interval of pass@1.

| task | prompts | pass@1 | pass@{samples} | mean tokens | truncated |
|---|---|---|---|---|---|
{table}

Sums are right more often when the steps are shown, which is what there is to be learnt:

| task | share that shows steps | pass@1 of those | pass@1 of the others |
|---|---|---|---|
{forms}

The mixture and the number of steps were chosen by these very figures, in a few tries, so they are a little optimistic.

Measured again, and this card written, by `keel.evaluate.card.write_card(FOLDER)`.
"""
