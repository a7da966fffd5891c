"""What two ranks do in the tests: every scenario on both, one after another, so that starting up is paid once."""

from dataclasses import replace
import sys
import time
from pathlib import Path

import torch
from stored import TASK, Stored, groups_of, make_policy, trained, trainer_of

from keel.config import RunConfig
from keel.errors import KeelError
from keel.models.policy import Policy
from keel.objectives.recipes import RECIPES
from keel.rollout.local import LocalEngine
from keel.training import checkpoint
from keel.training.batch import batch_from_groups
from keel.training.buffer import PromptStream
from keel.training.loop import _share
from keel.training.ranks import ALONE, joined
from keel.training.rollouts import Sampler

STEPS = 20
UNEQUAL = [groups_of([4, 3, 5, 2, 4], seed) for seed in range(STEPS)]
LONELY = [groups_of([4], seed) for seed in range(4)]  # one group: a rank has nothing
LOPSIDED = [groups_of([7, 2, 2], seed) for seed in range(4)]
POLICIES = {
    "plain": {},
    "fp32": dict(double=False),
    "mixture": dict(kind="qwen3_moe"),
    "by transformers": dict(kind="gpt2"),
    "adapters": dict(lora=True),
    "recomputed": dict(recompute=True),
    "recomputed by transformers": dict(kind="gpt2", recompute=True),
}
CASES = {f"recipe {name}": (name, UNEQUAL, "plain", {}) for name in sorted(RECIPES)}
CASES |= {f"policy {name}": ("grpo", UNEQUAL[:6], name, {}) for name in POLICIES if name not in ("plain", "fp32")}
CASES |= {
    "policy fp32": ("solid", UNEQUAL, "fp32", {"lr": 1e-4}),
    "a rank without completions": ("solid", LONELY, "plain", {}),
    "unequal micro-batches": ("dapo", LOPSIDED, "plain", {"micro_batch_tokens": 12}),
    "clipped": ("solid", UNEQUAL[:4], "plain", {"max_grad_norm": 1e-3}),
    "several updates": ("grpo", UNEQUAL[:4], "plain", {"updates_per_batch": 2}),
}


def compared(ranks):
    """Every case: weights and metrics of this rank."""
    told = {}
    for case, (name, batches, policy, train) in CASES.items():
        weights, records = trained(trainer_of(make_policy(**POLICIES[policy]), name, batches, ranks, **train))
        told[case] = weights, [record.metrics for record in records]
    return told


class Breaking(Policy):
    """Its log-probabilities are NaN while `broken`."""

    broken = False

    def logp(self, *given, **named):
        seen = super().logp(*given, **named)
        return replace(seen, logp=seen.logp * float("nan")) if self.broken else seen


def broken_on_one(ranks):
    """Step 2 has a NaN on rank 1: weights before and after it, and what each step says."""
    plain = make_policy()
    policy = Breaking(plain.model, plain.tokenizer, plain.template, plain.end_ids, plain.name)
    trainer = trainer_of(policy, "solid", UNEQUAL[:3], ranks, probe_every=0)
    before, first = trained(trainer, 1)
    policy.broken = ranks.rank == 1
    after, second = trained(trainer, 1)
    policy.broken = False
    end, third = trained(trainer)
    return before, after, end, [(r.skipped, r.metrics["train/skipped_steps"]) for r in first + second + third]


def saved(trainer, folder, ranks):
    tensors, clocks = trainer.state()
    checkpoint.save(folder, trainer.step, tensors, {"clocks": clocks}, 9, ranks)


def restored(folder, ranks, first):
    trainer = trainer_of(make_policy(), "grpo", UNEQUAL[:9], ranks)
    _, tensors, state = checkpoint.load(folder, like=trainer.cut_tensors(), ranks=ranks)
    trainer.restore(tensors, state["clocks"])
    trainer._rollouts = Stored(UNEQUAL[:9], first)  # restoring ends what sampled before
    return trainer


def through_checkpoints(ranks, folder):
    """Nine steps in one go; three, saved and restored on as many ranks; and three on two, three on one, three on two."""
    whole, _ = trained(trainer_of(make_policy(), "grpo", UNEQUAL[:9], ranks))
    trainer = trainer_of(make_policy(), "grpo", UNEQUAL[:9], ranks)
    trained(trainer, 3)
    saved(trainer, folder, ranks)
    same, _ = trained(restored(folder, ranks, 3))

    def alone():
        one = restored(folder, ALONE, 3)
        trained(one, 3)
        saved(one, folder, ALONE)

    ranks.by_first(alone)
    changed, _ = trained(restored(folder, ranks, 6))
    kinds = {path.name: sorted(inner.name for inner in path.iterdir()) for path in folder.iterdir() if path.is_dir()}
    return whole, same, changed, kinds


def sampled(ranks, prompts, live_only=False):
    """Token ids of one batch that the ranks sample together."""
    policy = make_policy(double=False)
    config = RunConfig(train={"prompts_per_step": prompts, "group_size": 4}, sampling={"max_completion_tokens": CAP_SAMPLED})
    stream = PromptStream(TASK.train, 0)
    sampler = Sampler(LocalEngine(policy), policy, TASK, stream, config, live_only, 1, ranks)
    collected = sampler.batch(0)
    return [c.token_ids.tolist() for group in collected.groups for c in group.completions], collected.generated_tokens, stream.taken


CAP_SAMPLED = 12


def refused(act):
    try:
        act()
    except KeelError as error:
        return str(error)
    return "was not refused"


def fails_on_one(ranks):
    def make():
        if ranks.rank == 1:
            raise KeelError("the disk is full")

    return refused(lambda: ranks.gather(make))


def passes(ranks):
    """Micro-batches of each rank, and how often it only stands by."""
    trainer = trainer_of(make_policy(), "dapo", LOPSIDED, ranks, micro_batch_tokens=12)
    batch = batch_from_groups(LOPSIDED[0])
    share = _share(trainer, batch, [torch.arange(len(batch))])
    return ranks.gather(lambda: (len(share.cuts), share.idle))


def scenarios(ranks, folder):
    """Name → what happens in it."""
    return {
        "compared": lambda: compared(ranks),
        "broken": lambda: broken_on_one(ranks),
        "checkpoints": lambda: through_checkpoints(ranks, folder),
        "sampled": lambda: [sampled(ranks, prompts) for prompts in (5, 1)],
        "differ": lambda: refused(lambda: ranks.check_same({"torch": f"2.{ranks.rank}", "numpy": "2"})),
        "failed": lambda: fails_on_one(ranks),
        "passes": lambda: passes(ranks),
    }


def main(folder, *modes):
    with joined("ddp", "cpu", 60.0) as ranks:
        for parallel in modes:
            tell(replace(ranks, sharded=parallel == "fsdp"), parallel, folder)


def tell(ranks, parallel, folder):
    told = {}
    for name, act in scenarios(ranks, folder / f"checkpoints-{parallel}").items():
        begin = time.monotonic()
        told[name] = act()
        print(f"{parallel} {name}: {time.monotonic() - begin:.1f} s", flush=True)
    torch.save(told, folder / f"{parallel}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
