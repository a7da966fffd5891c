"""Faults on purpose, put into the living system: each takes the place of a real piece while `planted` lasts.

    with planted("engine keeps one old tensor", "grader is always 0") as settings:
        keel.train("quickstart", **settings, steps=5)

What runs inside is keel itself with that piece broken. `SEEDED` is the table: what is broken, which part that is, a word that must
stand in the component's name, and settings without which the fault does not show.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from seeded_engines import ENGINES
from seeded_tasks import TASKS

from keel.objectives.objective import Objective


@dataclass
class Ground:
    """Where faults are planted: real names of real modules, put back at the end."""

    undo: list[tuple[Any, str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def put(self, place: str, make: Callable[[Any], Any]) -> None:
        """Replace `module:name` or `module:Class.name` by make(what stands there)."""
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for step in owners:
            owner = getattr(owner, step)
        old = vars(owner)[name]
        self.undo.append((owner, name, old))
        setattr(owner, name, make(old))

    def engine(self, wrap: Callable[[Any], Any]) -> None:
        """Every engine that is made from now on, wrapped."""
        self.put("keel.rollout.engines:engine_of", lambda old: lambda settings, policy: wrap(old(settings, policy)))

    def task(self, wrap: Callable[[Any], Any]) -> None:
        """Every task that is loaded from now on, wrapped; its check on load is switched off: one's own may have none."""
        from keel.tasks.task import unchecked_task as plain

        for place in ("keel.parts:get_task", "keel.tasks.task:get_task", "keel.tasks.task:unchecked_task"):
            self.put(place, lambda _: lambda spec, **options: wrap(plain(spec, **options)))

    def policy(self, spoil: Callable[[Any], None]) -> None:
        """Every policy that is loaded from now on, spoiled in place."""

        def loaded(old):
            def load(config):
                policy = old(config)
                spoil(policy)
                return policy

            return load

        self.put("keel.parts:_loaded", loaded)

    def clear(self) -> None:
        for owner, name, old in reversed(self.undo):
            setattr(owner, name, old)


@dataclass(frozen=True)
class Seeded:
    """One fault.

    Args:
        plant: breaks the ground.
        part: what is broken; component: a word of the component's name.
        museum: of the entry that it stands for.
        settings: dotted, with which it shows.
        seen_by: "probe" before the run, or "folder": only in what a run leaves.
    """

    plant: Callable[[Ground], None]
    part: str
    component: str
    museum: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seen_by: str = "probe"


@contextmanager
def planted(*names: str, table: dict[str, Seeded] | None = None) -> Iterator[dict[str, Any]]:
    """Plant these faults of `SEEDED`, or of another table, hand out settings with which they show, and mend all at the end."""
    ground, table = Ground(), SEEDED if table is None else table
    try:
        for name in names:
            ground.settings |= table[name].settings
            table[name].plant(ground)
        yield ground.settings
    finally:
        ground.clear()


def nothing(ground: Ground) -> None:
    """The fault is in the settings themselves."""


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LOOP = "keel.training.loop"


def accumulates(loss: Callable[..., Any]) -> Callable[[Ground], None]:
    """The gradient is that of `loss(objective, cuts, logp, entropy, part, prepared_part, counts)` in place of the objective's."""

    def plant(ground: Ground) -> None:
        def spoil(old):
            def accumulate(policy, objective, batch, prepared, counts, cuts, temperature, *idle):
                class Other(Objective):
                    def loss(self, *seen):
                        return loss(objective, cuts, *seen)

                other = Other(**{part.name: getattr(objective, part.name) for part in fields(Objective)})
                return old(policy, other, batch, prepared, counts, cuts, temperature, *idle)

            return accumulate

        ground.put(f"{LOOP}:accumulate_gradient", spoil)

    return plant


def _own_denominators(objective, cuts, logp, entropy, part, prepared, counts):
    """Each micro-batch is divided by its own counts, and the micro-batches averaged."""
    return objective.loss(logp, entropy, part, prepared, objective.counts(part, prepared, counts.max_tokens)) / len(cuts)


def _divided_twice(objective, cuts, *seen):
    """The step's loss, already divided by the whole step's counts, is divided by the number of micro-batches too."""
    return objective.loss(*seen) / len(cuts)


def last_micro_batch_only(ground: Ground) -> None:
    """Gradients are cleared between micro-batches: only the last one counts."""

    def spoil(old):
        def accumulate(policy, objective, batch, prepared, counts, cuts, temperature, *idle):
            for rows in cuts:
                policy.model.zero_grad()
                old(policy, objective, batch, prepared, counts, [rows], temperature)
            grads = {name: p.grad for name, p in policy.parameters().items()}
            for p in policy.parameters().values():
                p.grad = None
            told = old(policy, objective, batch, prepared, counts, cuts, temperature, *idle)
            for name, p in policy.parameters().items():
                p.grad = grads[name]
            return told

        return accumulate

    ground.put(f"{LOOP}:accumulate_gradient", spoil)


def non_finite_applied(ground: Ground) -> None:
    """A gradient with NaN is stepped on all the same."""

    def spoil(old):
        def apply(parameters, optimizer, max_grad_norm):
            from keel.training.step import Applied

            grads = [p.grad for p in parameters.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return Applied(norm)

        return apply

    ground.put(f"{LOOP}:apply_gradient", spoil)


def rows_left_over(ground: Ground) -> None:
    """Of several updates of a batch, the last takes the first one's rows again."""
    ground.put(f"{LOOP}:_updates", lambda old: lambda batch, updates: [*old(batch, updates)[:-1], old(batch, updates)[0]])


def old_is_now(ground: Ground) -> None:
    """logp_old is taken anew in every update: the ratio is 1 whatever the weights did."""
    ground.put(f"{LOOP}:_update", lambda old: lambda t, batch, prepared: old(t, replace(batch, logp_old=None), prepared))


def batch_with(change: Callable[[Any, Any], Any]) -> Callable[[Ground], None]:
    """A batch made of groups goes through `change(batch, groups)`."""
    return lambda ground: ground.put(f"{LOOP}:batch_from_groups", lambda old: lambda groups: change(old(groups), groups))


def _by_text(batch, groups):
    seen: dict[str, int] = {}
    ids = [seen.setdefault(group.prompt.text, len(seen)) for group in groups]
    return replace(batch, group=torch.tensor(ids)[batch.group])


def _by_position(batch, groups):
    size = len(groups[0].completions)
    return replace(batch, group=torch.arange(len(batch)) // size)


def _without_end(batch, groups):
    last = torch.arange(batch.mask.shape[1]) == batch.completion_len[:, None] - 1
    return replace(batch, mask=batch.mask & ~(last & ~batch.truncated[:, None]))


def _all_trained(batch, groups):
    return replace(batch, mask=torch.arange(batch.mask.shape[1]) < batch.completion_len[:, None])


def _shifted(batch, groups):
    return replace(batch, logp_rollout=batch.logp_rollout.roll(1, 1))


def tokenised_again(ground: Ground) -> None:
    """Completions go through their text, whose line ends a clean-up makes spaces, and are tokenised again."""

    def spoil(old):
        def batch(self, step):
            found = old(self, step)
            return replace(found, groups=[replace(g, completions=tuple(map(again, g.completions))) for g in found.groups])

        def again(c):
            return replace(c, token_ids=torch.where(c.token_ids == line_end, space, c.token_ids))

        line_end = space = None

        def first(self, step):
            nonlocal line_end, space
            line_end, space = (self.policy.tokenizer(text, add_special_tokens=False).input_ids[-1] for text in ("\n", " "))
            return batch(self, step)

        return first

    ground.put("keel.training.rollouts:Sampler.batch", spoil)


def left_padded(ground: Ground) -> None:
    """Shorter rows are padded on the left, and the padding is read."""

    def spoil(old):
        def logp(self, batch, **how):
            whole = batch.prompt_len + batch.completion_len
            pad = int(whole.max()) - whole
            rows = [
                torch.cat((row.new_zeros(int(n)), row[: int(size)])) for row, n, size in zip(batch.tokens, pad, whole, strict=True)
            ]
            return old(self, replace(batch, tokens=torch.stack(rows), prompt_len=batch.prompt_len + pad), **how)

        return logp

    ground.put("keel.models.policy:Policy.logp", spoil)


def no_temperature(ground: Ground) -> None:
    """The trainer's log-probabilities are those at temperature 1."""
    ground.put(
        "keel.models.policy:Policy.logp", lambda old: lambda self, batch, **how: old(self, batch, **how | {"temperature": 1.0})
    )


def dropout(ground: Ground) -> None:
    """Dropout is active while scoring."""

    def spoil(policy):
        policy.base.get_input_embeddings().register_forward_hook(lambda m, x, out: torch.nn.functional.dropout(out, 0.1, True))

    ground.policy(spoil)


def half_precision_weights(ground: Ground) -> None:
    """Master weights are bfloat16: small updates round away."""

    def spoil(policy):
        for p in policy.model.parameters():
            p.data = p.data.to(torch.bfloat16).to(p.dtype)

    def stepped(old):
        def apply(parameters, optimizer, max_grad_norm):
            told = old(parameters, optimizer, max_grad_norm)
            with torch.no_grad():
                for p in parameters.values():
                    p.copy_(p.to(torch.bfloat16))
            return told

        return apply

    ground.policy(spoil)
    ground.put(f"{LOOP}:apply_gradient", stepped)


def forgotten_tensor(ground: Ground) -> None:
    """One layer's matrix is never handed to the optimizer."""

    def spoil(policy):
        name = next(name for name, _ in policy.base.named_parameters() if name.endswith("down_proj.weight") or "down" in name)
        dict(policy.base.named_parameters())[name].requires_grad_(False)

    ground.policy(spoil)


def missing_end(ground: Ground) -> None:
    """The token that the model ends its answers with is not known as an end."""

    def spoil(policy):
        others = set(range(policy.base.get_output_embeddings().weight.shape[0])) - policy.end_ids
        policy.end_ids = frozenset({max(others)})

    ground.policy(spoil)


# ── the objective ─────────────────────────────────────────────────────────────────────────────────────────────────────

OBJECTIVE = "keel.objectives.objective"


def mask_by_product(ground: Ground) -> None:
    """Masked is multiplied by 0, so NaN comes through."""
    for room in ("objective", "advantages", "aggregate", "surrogates", "signals"):
        if hasattr(importlib.import_module(f"keel.objectives.{room}"), "keep"):
            ground.put(f"keel.objectives.{room}:keep", lambda old: lambda value, mask: value * mask)


def masked_in_baseline(ground: Ground) -> None:
    """What could not be scored counts as reward 0 in its group's baseline."""

    def spoil(old):
        def prepare(self, batch, max_tokens):
            zero = replace(batch, reward=torch.nan_to_num(batch.reward), scorable=torch.ones_like(batch.scorable))
            return old(self, zero, max_tokens)

        return prepare

    ground.put(f"{OBJECTIVE}:Objective.prepare", spoil)


def masked_in_denominator(ground: Ground) -> None:
    """Denominators count tokens that are not trained."""

    def spoil(old):
        def counts(self, batch, prepared, max_tokens):
            inside = torch.arange(prepared.mask.shape[1]) < batch.completion_len[:, None]
            return old(self, batch, replace(prepared, mask=inside), max_tokens)

        return counts

    ground.put(f"{OBJECTIVE}:Objective.counts", spoil)


def batch_for_group(ground: Ground) -> None:
    """The baseline is taken over the whole batch in place of the group."""

    def spoil(old):
        return lambda self, batch, scored: old(self, batch, replace(scored, group=torch.zeros_like(scored.group)))

    ground.put(f"{OBJECTIVE}:Objective._advantage", spoil)


def reversed_advantage(ground: Ground) -> None:
    """Advantages have the wrong sign."""
    ground.put(f"{OBJECTIVE}:Objective._advantage", lambda old: lambda self, *seen: -old(self, *seen))


def kl_sign(ground: Ground) -> None:
    """The KL to the reference is pushed up."""
    ground.put("keel.objectives.kl:LossKL.__call__", lambda old: lambda self, view: -old(self, view))


def kl_without_gradient(ground: Ground) -> None:
    """The KL stands in the loss without a gradient."""
    ground.put("keel.objectives.kl:LossKL.__call__", lambda old: lambda self, view: old(self, view).detach())


def wrong_reference(ground: Ground) -> None:
    """The reference is not the policy that training began with."""

    def spoil(old):
        def reference(policy, *where):
            told = old(policy, *where)
            with told() as frozen, torch.no_grad():
                for i, p in enumerate(frozen.model.parameters()):
                    p.add_(0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) if p.numel() > 1 else 0)
            return told

        return reference

    ground.put(f"{LOOP}:_reference", spoil)


def negative_entropy(ground: Ground) -> None:
    """Entropy is averaged over padding with a sentinel of −1."""
    ground.put(f"{LOOP}:measure", lambda old: lambda *seen: old(*seen) | {"policy/entropy_nats": -0.2})


def rewards_moved_on(ground: Ground) -> None:
    """Each completion gets the score of the one before."""

    def spoil(old):
        def score(answered, reward_many):
            groups = old(answered, reward_many)
            flat = [score for group in groups for score in group.scores]
            turned = iter([flat[-1], *flat[:-1]])
            return [replace(group, scores=tuple(next(turned) for _ in group.scores)) for group in groups]

        return score

    ground.put("keel.training.rollouts:score_groups", spoil)


def resume_without_moments(ground: Ground) -> None:
    """Resuming begins with an empty optimizer."""

    def spoil(old):
        def restore(self, tensors, clocks):
            old(self, {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}, clocks)

        return restore

    ground.put(f"{LOOP}:Trainer.restore", spoil)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SPARSE = {"task": "arithmetic:medium", "train.micro_batch_tokens": 400}
SEEDED: dict[str, Seeded] = {
    "each micro-batch has its own denominators": Seeded(
        accumulates(_own_denominators),
        "framework",
        "denominator",
        "F01",
        SPARSE | {"recipe": "dapo", "train.dynamic_sampling": False},
    ),
    "divided by the number of micro-batches too": Seeded(accumulates(_divided_twice), "framework", "accumul", "F02", SPARSE),
    "only the last micro-batch counts": Seeded(last_micro_batch_only, "framework", "accumul", "F02", SPARSE),
    "a non-finite gradient is applied": Seeded(non_finite_applied, "framework", "gradient", "F31"),
    "rows left over are trained twice": Seeded(rows_left_over, "framework", "updates", "F23", {"train.updates_per_batch": 2}),
    "the ratio is always 1": Seeded(old_is_now, "framework", "ratio", "F22", {"train.updates_per_batch": 2, "recipe": "grpo"}),
    "a fresh group for every row": Seeded(
        batch_with(lambda batch, groups: replace(batch, group=torch.arange(len(batch)))), "framework", "group", "F06"
    ),
    "groups by text": Seeded(batch_with(_by_text), "framework", "group", "F07"),
    "groups by position": Seeded(batch_with(_by_position), "framework", "group", "F08"),
    "end tokens are not trained": Seeded(batch_with(_without_end), "framework", "mask", "F17"),
    "tool tokens are trained": Seeded(batch_with(_all_trained), "framework", "mask", "F42"),
    "log-probabilities one token off": Seeded(batch_with(_shifted), "framework", "align", "F39"),
    "text is tokenised again": Seeded(tokenised_again, "framework", "token", "F43"),
    "left padding is read": Seeded(left_padded, "framework", "padding", "F40"),
    "the trainer forgets the temperature": Seeded(no_temperature, "framework", "temperature", "F09", {"sampling.temperature": 0.7}),
    "dropout while scoring": Seeded(dropout, "framework", "dropout", "F45"),
    "a tensor is never trained": Seeded(forgotten_tensor, "framework", "parameter", "F53"),
    "weights in bfloat16": Seeded(half_precision_weights, "settings", "precision", "F53", {"train.lr": 1e-6}),
    "an end token is unknown": Seeded(missing_end, "framework", "end", "F36"),
    "masked by multiplication": Seeded(mask_by_product, "framework", "mask", "F16"),
    "unscorable rows in the baseline": Seeded(masked_in_baseline, "framework", "mask", "F15"),
    "masked tokens in the denominator": Seeded(
        masked_in_denominator, "framework", "denominator", "F21", {"recipe": "dapo", "train.dynamic_sampling": False}
    ),
    "the batch's mean for the group's": Seeded(batch_for_group, "framework", "advantage", "F25"),
    "advantages of the wrong sign": Seeded(reversed_advantage, "framework", "advantage", "F04"),
    "KL of the wrong sign": Seeded(kl_sign, "framework", "KL", "F04", {"recipe": "grpo"}),
    "KL without gradient": Seeded(kl_without_gradient, "framework", "KL", "F05", {"recipe": "grpo"}),
    "another reference": Seeded(wrong_reference, "framework", "reference", "F52", {"recipe": "grpo"}),
    "entropy below 0": Seeded(negative_entropy, "framework", "metric", "F74", seen_by="folder"),
    "scores of other completions": Seeded(rewards_moved_on, "framework", "pairing", "F51"),
    "resuming without moments": Seeded(resume_without_moments, "framework", "checkpoint", "F70"),
    **{name: Seeded(plant, *rest) for name, (plant, *rest) in (ENGINES | TASKS).items()},
    "a cap that cuts everything": Seeded(nothing, "settings", "budget", "F20", {"sampling.max_completion_tokens": 3}),
    "a learning rate that changes no bit": Seeded(nothing, "settings", "learning rate", "F53", {"train.lr": 1e-14}),
}
