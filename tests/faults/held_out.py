"""Faults in other places, of another size or sign, or only in part; none of them was known when the probes were first written.

The same mechanism as `seeded.py`, whose table they extend. A component is any of the words between bars. `tests/faults/score.py`
says how many the doctor finds; what it misses stays in the table. All were written without a look at the probes: of the first 76 it
named part and component in 49 at first, of the 42 that came later in 28. The probes learned from the rest.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace

import torch
from held_out_engines import ENGINES
from held_out_loop import TRAINING
from held_out_tasks import SIZES, TASKS, sums_in_a_file
from seeded import Seeded, accumulates, nothing

from keel.models.policy import Policy
from keel.objectives.objective import Objective

LOOP, GRPO, LORA = "keel.training.loop", {"recipe": "grpo"}, {"lora": {"rank": 4}}
CUTS = {"task": "arithmetic:medium", "train.micro_batch_tokens": 700}


# ── the gradient ──────────────────────────────────────────────────────────────────────────────────────────────────────


def last_cut_left_out(ground):
    """The last micro-batch of several is forgotten."""

    def spoil(old):
        return lambda policy, objective, batch, prepared, counts, cuts, *rest: old(
            policy, objective, batch, prepared, counts, cuts[:-1] if len(cuts) > 1 else cuts, *rest
        )

    ground.put(f"{LOOP}:accumulate_gradient", spoil)


def _by_rows(objective, cuts, logp, entropy, part, prepared, counts):
    """Each micro-batch is divided by its own counts and weighs by its rows."""
    own = objective.loss(logp, entropy, part, prepared, objective.counts(part, prepared, counts.max_tokens))
    return own * (len(part) / sum(map(len, cuts)))


def dropout_in_updates_only(ground):
    """The embedding loses a tenth of its numbers while gradients are taken, and at no other time."""

    def spoil(old):
        def accumulate(policy, *rest):
            weight = policy.base.get_input_embeddings().weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.mul_((torch.rand_like(weight) > 0.1).float() / 0.9)
            try:
                return old(policy, *rest)
            finally:
                with torch.no_grad():
                    weight.copy_(kept)

        return accumulate

    ground.put(f"{LOOP}:accumulate_gradient", spoil)


def every_second_update_is_lost(ground):
    """The second update of a batch clears the gradient and does not step."""
    seen = [0]

    def spoil(old):
        def apply(parameters, optimizer, most):
            seen[0] += 1
            if seen[0] % 2:
                return old(parameters, optimizer, most)
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))
            optimizer.zero_grad(set_to_none=True)
            return type(old(parameters, optimizer, most))(norm)

        return apply

    ground.put(f"{LOOP}:apply_gradient", spoil)


def gradients_pile_up(ground):
    """The gradient is not cleared after a step: the next one adds to it."""

    def spoil(old):
        def apply(parameters, optimizer, most):
            kept = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
            applied = old(parameters, optimizer, most)
            for name, grad in kept.items():
                parameters[name].grad = grad
            return applied

        return apply

    ground.put(f"{LOOP}:apply_gradient", spoil)


def norms_not_in_the_optimizer(ground):
    """Layer norms get gradients, and the optimizer does not hold them."""

    def spoil(old):
        def init(self, *args, **kwargs):
            old(self, *args, **kwargs)
            held = {id(p) for name, p in self.parameters.items() if "norm" not in name}
            for group in self.optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in held]

        return init

    ground.put(f"{LOOP}:Trainer.__init__", spoil)


def only_lora_a(ground):
    """Of the adapters only A trains; B stays zero, so nothing ever changes."""
    ground.policy(lambda policy: [p.requires_grad_(False) for n, p in policy.model.named_parameters() if "lora_B" in n])


# ── rows and masks ────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_with(change):
    """Every batch goes through `change`."""
    return lambda ground: ground.put(f"{LOOP}:batch_from_groups", lambda old: lambda groups: change(old(groups)))


def masked_at(place):
    """The mask is taken away where `place(columns [T], lengths [B, 1])` says."""

    def change(batch):
        columns = torch.arange(batch.mask.shape[1])
        return replace(batch, mask=batch.mask & ~place(columns, batch.completion_len[:, None]))

    return batch_with(change)


def _rolled_groups(batch):
    """Groups begin one row late."""
    return replace(batch, group=batch.group.roll(1))


def _last_two_groups_are_one(batch):
    return replace(batch, group=batch.group.clamp(max=int(batch.group.max()) - 1))


def _prompts_of_others(batch):
    """In a batch as training sees it, completions stand behind the prompt of the group before, where it has the same length."""
    tokens = batch.tokens.clone()
    for row in range(len(batch)):
        other, n = (row - 8) % len(batch), int(batch.prompt_len[row])
        if int(batch.prompt_len[other]) == n:
            tokens[row, :n] = batch.tokens[other, :n]
    return replace(batch, tokens=tokens)


def scores_of_siblings(ground):
    """Within a group every completion gets the score of the one before."""

    def spoil(old):
        def score(answered, reward_many):
            return [replace(g, scores=(*g.scores[-1:], *g.scores[:-1])) for g in old(answered, reward_many)]

        return score

    ground.put("keel.training.rollouts:score_groups", spoil)


def unscorable_is_zero(ground):
    """A verifier that failed is a wrong answer; one completion in ten makes it fail."""

    def spoil(old):
        return lambda score: replace(score, value=0.0) if score.value is None else old(score)

    ground.put("keel.training.buffer:_finite", spoil)


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────────────────────────────


def logp_with(change):
    """Every forward pass of a policy goes through `change(old, policy, batch, temperature, replay)`."""

    def plant(ground):
        def spoil(old):
            return lambda self, batch, *, temperature=1.0, replay_experts=False: change(
                old, self, batch, temperature, replay_experts
            )

        ground.put("keel.models.policy:Policy.logp", spoil)

    return plant


def _divided_after(old, policy, batch, temperature, replay):
    seen = old(policy, batch, temperature=1.0, replay_experts=replay)
    return replace(seen, logp=seen.logp / temperature)


def _five_percent_colder(old, policy, batch, temperature, replay):
    return old(policy, batch, temperature=temperature * 0.95, replay_experts=replay)


def _whole_vocabulary(old, policy, batch, temperature, replay):
    return old(policy, replace(batch, kept=None), temperature=temperature, replay_experts=replay)


def no_temperature_in_old(ground):
    """The passes before the first update are made at temperature 1, the update's own are not."""
    ground.put(f"{LOOP}:look", lambda old: lambda policy, batch, cuts, temperature, *idle: old(policy, batch, cuts, 1.0, *idle))


def no_temperature_in_reference(ground):
    """The reference is asked at temperature 1, the policy is not."""

    class Plain(Policy):
        def logp(self, batch, *, temperature=1.0, replay_experts=False):
            return super().logp(batch, temperature=1.0, replay_experts=replay_experts)

    def spoil(old):
        def make(policy, *where):
            ask = old(policy, *where)

            @contextmanager
            def asked():
                with ask() as held:
                    yield Plain(held.model, held.tokenizer, held.template, held.end_ids, held.name)

            return asked

        return make

    ground.put(f"{LOOP}:_reference", spoil)


# ── advantages and KL ─────────────────────────────────────────────────────────────────────────────────────────────────

PARTS = "keel.objectives.advantages"


def advantage_with(change):
    """Every advantage goes through `change(old, advantage, returns, scored)`."""
    return lambda ground: ground.put(f"{PARTS}:Advantage.__call__", lambda old: lambda self, r, s: change(old, self, r, s))


def _not_centred(old, advantage, returns, scored):
    return old(replace(advantage, baseline=lambda s: torch.zeros_like(s.reward)), returns, scored)


def _never_negative(old, advantage, returns, scored):
    return old(advantage, returns, scored).clamp(min=0.0)


def _itself_included(old, advantage, returns, scored):
    """The mean of all in place of the mean of the others."""
    from keel.objectives.advantages import group_mean

    return old(replace(advantage, baseline=group_mean), returns, scored)


def variance_for_std(ground):
    def spoil(old):
        return lambda self, advantage, deviation, scored: old(self, old(self, advantage, deviation, scored), deviation, scored)

    ground.put(f"{PARTS}:_Std._divide", spoil)


def constant_groups_are_pushed(ground):
    """The mean is rounded to bfloat16, so that equal rewards of .3 have an advantage."""

    def spoil(old):
        def statistics(scored, value=None):
            total, count, equal = old(scored, value)
            return total.bfloat16().float() * 1.002, count, equal & False

        return statistics

    ground.put(f"{PARTS}:_group_statistics", spoil)


def reward_kl_with(factor):
    def plant(ground):
        def spoil(old):
            return lambda self, d, mask: tuple(factor * paid for paid in old(self, d, mask))

        ground.put("keel.objectives.kl:RewardKL.penalty", spoil)

    return plant


def loss_kl_counts_double(ground):
    ground.put("keel.objectives.kl:LossKL.__call__", lambda old: lambda self, view: 2 * old(self, view))


def clip_never_binds(ground):
    """The ratio reaches the surrogate cut to 1 ± .001: beyond that nothing is learnt."""
    from keel.objectives import objective

    def spoil(old):
        def view(self, *seen):
            found = old(self, *seen)
            return replace(found, log_ratio=found.log_ratio.clamp(-1e-3, 1e-3), importance=found.importance.clamp(0.999, 1.001))

        return view

    assert objective.Objective is Objective
    ground.put("keel.objectives.objective:Objective.view", spoil)


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def restored_with(change):
    """A checkpoint's tensors and clocks go through `change` before they are taken."""

    def plant(ground):
        def spoil(old):
            return lambda self, tensors, clocks: old(self, *change(dict(tensors), dict(clocks)))

        ground.put(f"{LOOP}:Trainer.restore", spoil)

    return plant


def _stream_begins_again(tensors, clocks):
    return tensors, clocks | {"prompts_taken": 0}


def _schedule_begins_again(tensors, clocks):
    return tensors, clocks | {"updates": 0}


def _moments_count_from_zero(tensors, clocks):
    return {n: torch.zeros_like(t) if re.search(r"optimizer\..*\.step$", n) else t for n, t in tensors.items()}, clocks


def _second_moments_in_half(tensors, clocks):
    return {n: t.bfloat16().float() if n.endswith("exp_avg_sq") else t for n, t in tensors.items()}, clocks


def _weights_in_half(tensors, clocks):
    return {n: t.bfloat16().float() if n.startswith("weights.") else t for n, t in tensors.items()}, clocks


def half(ground):
    ground.policy(lambda policy: policy.model.bfloat16())


TWO = {"train.updates_per_batch": 2}
COLD = {"sampling.temperature": 0.7}
FRAMEWORK = {  # fault: how, component, museum, settings
    "the last micro-batch is left out": (last_cut_left_out, "accumul|updates", "F02", CUTS),
    "multiplied by the number of micro-batches": (
        accumulates(lambda objective, cuts, *seen: objective.loss(*seen) * len(cuts)),
        "accumul",
        "F02",
        CUTS,
    ),
    "micro-batches weigh by their rows": (
        accumulates(_by_rows),
        "denominators|accumul",
        "F01",
        CUTS | {"recipe": "dapo", "train.dynamic_sampling": False},
    ),
    "dropout in updates only": (dropout_in_updates_only, "dropout", "F45", {}),
    "every second update is lost": (every_second_update_is_lost, "updates", "F23", TWO),
    "gradients pile up": (gradients_pile_up, "updates|accumul|gradient", "F23", {}),
    "norms are not in the optimizer": (norms_not_in_the_optimizer, "parameter", "F53", {}),
    "only A of LoRA trains": (only_lora_a, "parameter", "F53", LORA),
    "groups begin one row late": (batch_with(_rolled_groups), "group", "F08", {}),
    "the last two groups are one": (batch_with(_last_two_groups_are_one), "group", "F08", {}),
    "completions behind other prompts": (batch_with(_prompts_of_others), "pairing|token", "F51", {}),
    "the first token is not trained": (masked_at(lambda t, n: t == 0), "mask", "F39", {}),
    "the last token of long completions is not trained": (masked_at(lambda t, n: (t == n - 1) & (n > 14)), "mask", "F17", {}),
    "tokens after the sixteenth are not trained": (masked_at(lambda t, n: (t >= 16).expand(len(n), -1)), "mask", "F42", {}),
    "scores of siblings": (scores_of_siblings, "pairing", "F51", {}),
    "unscorable is zero": (unscorable_is_zero, "baseline|verdict", "F62", {}),
    "log-probabilities are divided after the softmax": (logp_with(_divided_after), "temperature|log-prob", "F09", COLD),
    "the trainer is five percent colder": (logp_with(_five_percent_colder), "temperature|log-prob", "F88", {}),
    "the trainer normalises over everything": (logp_with(_whole_vocabulary), "log-prob|kept", "F11", {"sampling.top_p": 0.8}),
    "no temperature in logp_old": (no_temperature_in_old, "temperature|ratio", "F09", COLD | TWO | GRPO),
    "no temperature in the reference": (no_temperature_in_reference, "reference|temperature", "F09", COLD | GRPO),
    "divided, not centred": (advantage_with(_not_centred), "advantage", "F25", GRPO),
    "no negative advantages": (advantage_with(_never_negative), "advantage", "F06", {}),
    "the baseline includes itself": (advantage_with(_itself_included), "advantage", "F25", {}),
    "the variance for the deviation": (variance_for_std, "advantage", "F28", GRPO),
    "equal rewards are pushed": (constant_groups_are_pushed, "advantage", "F28", GRPO),
    "KL in the reward of the wrong sign": (reward_kl_with(-1.0), "KL", "F04", {"recipe": "rloo"}),
    "KL in the reward is not paid": (reward_kl_with(0.0), "KL", "F05", {"recipe": "rloo"}),
    "KL in the loss counts double": (loss_kl_counts_double, "KL", "F05", GRPO),
    "a ratio that hardly moves": (clip_never_binds, "ratio", "F22", TWO | GRPO),
    "resuming begins the prompts again": (restored_with(_stream_begins_again), "checkpoint", "F69", {}),
    "resuming begins the schedule again": (
        restored_with(_schedule_begins_again),
        "checkpoint",
        "F70",
        {"train.lr_schedule": "linear"},
    ),
    "resuming counts moments from zero": (restored_with(_moments_count_from_zero), "checkpoint", "F70", {}),
    "resuming rounds second moments": (restored_with(_second_moments_in_half), "checkpoint", "F70", {}),
    "resuming rounds weights": (restored_with(_weights_in_half), "checkpoint", "F70", {}),
}
SETTINGS = {
    "a learning rate a thousand times too large": (nothing, "learning rate", "F53", {"train.lr": 0.1}),
    "a warm-up that never ends": (nothing, "learning rate", "F53", {"train.warmup_steps": 10**12}),
    "bfloat16 weights at 1e-5": (half, "precision", "F53", {"train.lr": 1e-5}),
    "a cap at half of what is needed": (nothing, "budget", "F20", {"sampling.max_completion_tokens": 9}),
    "a temperature of 4": (nothing, "temperature|sampl|noise|entropy", "F68", {"sampling.temperature": 4.0}),
    "a weight decay of 300": (nothing, "decay|weight|optimi|learning rate", "", {"train.weight_decay": 300.0}),
    "an entropy bonus of 1": (nothing, "entropy|coef|bonus", "", {"objective.entropy_coef": 1.0}),
}
HELD_OUT: dict[str, Seeded] = {
    **{name: Seeded(f, "framework", word, museum, more) for name, (f, word, museum, more) in (FRAMEWORK | TRAINING).items()},
    **{name: Seeded(f, "settings", word, museum, more) for name, (f, word, museum, more) in SETTINGS.items()},
    **{name: Seeded(f, "engine gap", word, museum, more) for name, (f, word, museum, more) in ENGINES.items()},
    **{name: Seeded(f, part, word, museum, more) for name, (f, part, word, museum, more) in TASKS.items()},
}
HEALTHY: dict[str, dict] = {
    "solid, two completions": {"train.group_size": 2, "seed": 11},
    "moe": {"model": "tiny-moe", "seed": 12},
    "lora, dr_grpo": {"recipe": "dr_grpo", **LORA, "seed": 13},
    "warm and truncated, replayed": {"sampling.temperature": 1.5, "sampling.top_p": 0.9, "sampling.top_k": 10, "seed": 14},
    "min_p, grpo": {"recipe": "grpo", "sampling.min_p": 0.05, "seed": 15},
    "curriculum": {"train.curriculum": "pass_rate", "seed": 16},
    "dynamic sampling": {"train.dynamic_sampling": True, "seed": 17},
    "four prompts a step": {"train.prompts_per_step": 4, "train.group_size": 4, "seed": 18},
    "easy sums": {"task": "arithmetic:easy", "seed": 19},
    "hard sums, dapo, three updates": {"recipe": "dapo", "task": "arithmetic:hard", "train.updates_per_batch": 3, "seed": 20},
    "subtraction, cold": {"task": "skills:subtract", "sampling.temperature": 0.6, "seed": 21},
    "maxima, gspo": {"recipe": "gspo", "task": "skills:max", "seed": 22},
    "small micro-batches, rloo": {"recipe": "rloo", "train.micro_batch_tokens": 200, "seed": 23},
    "reinforce_pp, cosine": {"recipe": "reinforce_pp", "train.lr_schedule": "cosine", "train.warmup_steps": 5, "seed": 24},
    "moe, lora, R3": {"model": "tiny-moe", **LORA, "train.routing_replay": "R3", "seed": 25},
    "gmpo, easy sums, four updates": {
        "recipe": "gmpo",
        "seed": 200,
        "task": f"arithmetic:easy?{SIZES}",
        "train.updates_per_batch": 4,
        "train.prompts_per_step": 8,
    },
    "sapo, hot and truncated": {
        "recipe": "sapo",
        "seed": 201,
        "train.updates_per_batch": 2,
        "sampling.temperature": 1.2,
        "sampling.top_p": 0.95,
    },
    "a mixture, icepop, R2": {
        "recipe": "icepop",
        "model": "tiny-moe",
        "seed": 202,
        "train.routing_replay": "R2",
        "train.updates_per_batch": 2,
    },
    "adapters on two layers' kinds, deepseek_v32": {
        "recipe": "deepseek_v32",
        "seed": 203,
        "lora.rank": 4,
        "lora.alpha": 16.0,
        "lora.targets": ["q_proj", "v_proj"],
        "train.lr": 5e-4,
        "train.updates_per_batch": 2,
    },
    "the engine's own log-probabilities for old": {
        "recipe": "grpo",
        "seed": 204,
        "train.bypass_old": True,
        "train.updates_per_batch": 2,
    },
    "a hundred and twenty-eight pairs": {"recipe": "solid", "seed": 205, "train.prompts_per_step": 128, "train.group_size": 2},
    "lite_ppo without a clip of the norm, some decay": {
        "recipe": "lite_ppo",
        "seed": 206,
        "train.max_grad_norm": None,
        "train.weight_decay": 0.1,
        "train.betas": [0.9, 0.99],
    },
    "a small entropy bonus": {"recipe": "solid", "seed": 207, "objective.entropy_coef": 0.001, "train.warmup_steps": 5},
    "rows from a file, the last number": {"recipe": "dr_grpo", "seed": 208, "task": sums_in_a_file()},
    "subtraction, groups of thirty-two": {
        "recipe": "rloo",
        "seed": 209,
        "task": f"skills:subtract?{SIZES}",
        "train.prompts_per_step": 8,
        "train.group_size": 32,
        "objective.reward_kl.kl_coef": 0.01,
    },
    "live groups alone, pass rates, a schedule": {
        "recipe": "solid",
        "seed": 210,
        "train.dynamic_sampling": True,
        "train.curriculum": "pass_rate",
        "train.lr_schedule": "cosine",
        "train.prompts_per_step": 16,
    },
    "one row at a time, cold, decoupled": {
        "recipe": "decoupled",
        "seed": 211,
        "train.micro_batch_tokens": 1,
        "train.prompts_per_step": 6,
        "train.group_size": 5,
        "train.updates_per_batch": 2,
        "sampling.temperature": 0.75,
    },
    "maxima that are mostly known": {"recipe": "reinforce_pp", "seed": 212, "task": f"skills:max?{SIZES}", "sampling.min_p": 0.03},
}
