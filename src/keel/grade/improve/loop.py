"""Measure a judge, mine its errors, train on them, measure again; then train a policy against the judge before and after."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from keel.config import RunConfig, load_config
from keel.evaluate import evaluate
from keel.grade.improve.examples import FIRST, Example, balanced, drawn, frozen_set, sampled
from keel.grade.improve.judge import LONGEST_VERDICT, Judge, JudgeGrader
from keel.grade.improve.solutions import KINDS
from keel.grade.improve.training import judging, mixed, teach
from keel.grade.rates import Interval, Rate, difference, rate
from keel.models.load import load_policy
from keel.models.policy import Policy
from keel.models.pretrain import Schedule
from keel.rollout.engine import Seed
from keel.rollout.local import LocalEngine
from keel.tasks.task import PromptTask, get_task
from keel.training.loop import Trainer, iterate

TASK, MODEL = "arithmetic:medium", "tiny-dense"
EVALUATED = 2**31 + 5  # the step that a trained policy is evaluated under
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        frozen, pool: examples that judges are measured on, and in which errors are looked for, each round.
        block: supervised steps between two looks at the plateau; most_blocks: at most so many.
        round_steps: supervised steps of a round; rounds: of mining.
        judge_steps, policy_steps: of reinforcement.
        prompts: behind one step of a policy's training; evaluated: held-out prompts, four samples each.
    """

    frozen: int = 900
    pool: int = 3000
    block: int = 100
    most_blocks: int = 20
    round_steps: int = 300
    rounds: int = 2
    judge_steps: int = 40
    policy_steps: int = 60
    prompts: int = 16
    evaluated: int = 256


@dataclass(frozen=True)
class Measured:
    """A judge on the frozen set.

    Args:
        after: which stage of the loop.
        tpr, fpr: of solutions that are wholly right, and of the others, those that it passes (level 1).
        j: TPR − FPR.
        level, reason: share of its levels, and of the lines that it names, that are true.
        mined: errors that it was trained on so far.
    """

    after: str
    tpr: Rate
    fpr: Rate
    j: Interval
    level: float
    reason: float
    mined: int


def measure(judge: Judge, examples: Sequence[Example], after: str, mined: int) -> Measured:
    """Against computed truth; a verdict that cannot be read passes nothing."""
    import numpy as np

    said = judge.judge([(e.parts, e.text) for e in examples])
    passed = np.array([s is not None and s.level == 1.0 for s in said])
    right = np.array([e.truth.level == 1.0 for e in examples])
    keys = [str(e.parts) for e in examples]
    tpr, fpr = (rate(passed[where], [k for k, w in zip(keys, where, strict=True) if w]) for where in (right, ~right))
    same = [s is not None and s.level == e.truth.level for s, e in zip(said, examples, strict=True)]
    reason = [s is not None and s.step == e.truth.step for s, e in zip(said, examples, strict=True)]
    return Measured(after, tpr, fpr, difference(tpr, fpr), float(np.mean(same)), float(np.mean(reason)), mined)


def first_judge(seed: int, sizes: Sizes, say: Say) -> Policy:
    """A judge that was taught plain mistakes to its plateau: two blocks of steps without a better accuracy on fresh ones."""
    policy, rng = load_policy(MODEL), random.Random(f"plateau {seed}")
    fresh = [drawn(rng, FIRST) for _ in range(400)]
    best, since = 0.0, 0
    for block in range(sizes.most_blocks):
        schedule = Schedule(steps=sizes.block, lr=1e-3, warmup=10 if block == 0 else 0)
        teach(policy, lambda rng: drawn(rng, FIRST), schedule, f"first {seed} {block}")
        found = measure(Judge.of(policy), fresh, "", 0).level
        say(f"first judge, {(block + 1) * sizes.block} steps: {found:.3f} of its levels are true on what it was taught")
        best, since = max(best, found), 0 if found > best + 0.005 else since + 1
        if since == 2:
            break
    return policy


def errors_of(judge: Judge, pool: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples that it gets wrong, in level or in reason, and those that it gets right."""
    said = judge.judge([(e.parts, e.text) for e in pool])
    wrong = [s != e.truth for s, e in zip(said, pool, strict=True)]
    return [e for e, w in zip(pool, wrong, strict=True) if w], [e for e, w in zip(pool, wrong, strict=True) if not w]


def mine(policy: Policy, writer: Policy, seed: int, number: int, sizes: Sizes) -> list[Example]:
    """The judge's errors, in what a policy writes to training sums and what is made in every way; and as much else."""
    rng, task = random.Random(f"pool {seed} {number}"), get_task(TASK)
    asked = rng.sample(list(task.train), sizes.pool // 16)
    pool = sampled(writer, asked, 8, Seed(seed, 2**31 + 6 + number))
    pool += [drawn(rng, dict.fromkeys(KINDS, 1.0)) for _ in range(sizes.pool // 2)]
    wrong, right = errors_of(Judge.of(policy), list(dict.fromkeys(pool)))
    return wrong + rng.sample(right, min(len(right), len(wrong)))


def reinforce(policy: Policy, examples: Sequence[Example], seed: int, sizes: Sizes) -> None:
    """Train the judge on its task: (1 − |s′ − s|), where its reason holds; on as many examples of each level."""
    examples = random.Random(f"reinforce {seed}").sample(examples, len(examples))
    examples = balanced(examples, len(examples)) or examples
    changes = {"sampling.max_completion_tokens": LONGEST_VERDICT, "train.prompts_per_step": 32}
    _run(policy, judging(examples, examples[:1]), _settings(sizes.judge_steps, sizes, seed, changes))


def judged(judge: Policy) -> PromptTask:
    """The sums, with a judge in place of the truth."""
    task, grader = get_task(TASK), JudgeGrader(Judge.of(judge))
    return replace(task, name="judged", grade=grader, own_gold_only=False)


def trained_against(judge: Policy, seed: int, sizes: Sizes) -> tuple[float, float]:
    """True pass@1 and the judge's own mean level, of a policy that was trained against it."""
    policy, task = load_policy(MODEL), judged(judge)
    _run(policy, task, _settings(sizes.policy_steps, sizes, seed, {"train.prompts_per_step": sizes.prompts}))
    return true_accuracy(policy, seed, sizes), judge_mean(policy, task, seed, sizes)


def true_accuracy(policy: Policy, seed: int, sizes: Sizes) -> float:
    return _evaluated(policy, get_task(TASK), seed, sizes)["pass@1"]


def judge_mean(policy: Policy, task: PromptTask, seed: int, sizes: Sizes) -> float:
    return _evaluated(policy, task, seed, sizes)["reward_mean"]


def _evaluated(policy: Policy, task: PromptTask, seed: int, sizes: Sizes) -> dict[str, float]:
    prompts = [policy.template.render(prompt, policy.tokenizer) for prompt in task.test[: sizes.evaluated]]
    config = load_config("solid", {"model": MODEL})
    return evaluate(LocalEngine(policy), prompts, task, config.sampling.distribution(), 4, Seed(seed, EVALUATED), (1,))


def _settings(steps: int, sizes: Sizes, seed: int, changes: dict) -> RunConfig:
    given = {"model": MODEL, "steps": steps, "seed": seed, "train.lr": 1e-4, "train.probe_every": 0}
    return load_config("solid", given | changes).resolved()


def _run(policy: Policy, task: PromptTask, config: RunConfig) -> None:
    trainer = Trainer(policy, LocalEngine(policy), task, config.chosen(), config)
    for _ in iterate(trainer):
        pass


@dataclass(frozen=True)
class Improved:
    """What came of the loop.

    Args:
        stages: the judge on the frozen set: first, after each round, and after reinforcement.
        before, after: true pass@1 of policies trained against the first and the last judge, by seed; `untrained`: of none.
        believed_before, believed_after: the mean level that those judges gave them.
    """

    stages: list[Measured]
    untrained: float
    before: list[float]
    after: list[float]
    believed_before: list[float]
    believed_after: list[float]


def improve(seeds: int = 5, seed: int = 0, sizes: Sizes | None = None, say: Say = lambda text: None) -> Improved:
    """The whole loop, and what it is worth to a policy."""
    sizes, writer = sizes or Sizes(), load_policy(MODEL)
    frozen = frozen_set(writer, get_task(TASK).test, sizes.frozen, seed)
    policy = first_judge(seed, sizes, say)
    first, stages, mined = deepcopy(policy.weights()), [measure(Judge.of(policy), frozen, "first", 0)], []
    say(_told(stages[-1]))
    for number in range(sizes.rounds):
        mined += mine(policy, writer, seed, number, sizes)
        schedule = Schedule(steps=sizes.round_steps, lr=1e-3, warmup=10)
        teach(policy, mixed(lambda rng: drawn(rng, FIRST), mined, 0.7), schedule, f"round {seed} {number}")
        stages.append(measure(Judge.of(policy), frozen, f"round {number + 1}", len(mined)))
        say(_told(stages[-1]))
    reinforce(policy, mined, seed, sizes)
    stages.append(measure(Judge.of(policy), frozen, "reinforced", len(mined)))
    say(_told(stages[-1]))
    start = load_policy(MODEL)
    start.model.load_state_dict(first, strict=False)
    results: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
    for number in range(seeds):
        for name, judge in (("before", start), ("after", policy)):
            results[name].append(trained_against(judge, number, sizes))
            true, believed = results[name][-1]
            say(f"policy, seed {number}, judge {name}: true pass@1 {true:.3f}; the judge believes {believed:.3f}")
    true = {name: [row[0] for row in rows] for name, rows in results.items()}
    believed = {f"believed_{name}": [row[1] for row in rows] for name, rows in results.items()}
    return Improved(stages, true_accuracy(writer, seed, sizes), **true, **believed)


def _told(m: Measured) -> str:
    return (
        f"judge ({m.after}): J {m.j.mean:.3f} ({m.j.low:.3f} to {m.j.high:.3f}), TPR {m.tpr.mean:.3f}, FPR {m.fpr.mean:.3f}, "
        f"levels {m.level:.3f}, reasons {m.reason:.3f}, mined {m.mined}"
    )
