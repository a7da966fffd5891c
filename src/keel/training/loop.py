"""The training loop, as a generator: prompts → completions → scores → advantages → updates → new weights in the engine.

It yields one StepRecord per optimizer step and does nothing else with them; whoever consumes them prints, saves or evaluates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from keel.config import RunConfig
from keel.diagnostics import measure, measure_routing
from keel.diagnostics.parts import part_metrics
from keel.models.lora import plain_copy, reference, started_from_zero
from keel.models.policy import Policy, TokenLogp
from keel.models.routing import check_recorded, check_replayable
from keel.models.sharding import cut_like
from keel.objectives.objective import Objective, Prepared
from keel.objectives.recipes import Recipe
from keel.rollout.engine import Engine
from keel.tasks.task import Task
from keel.training.ahead import Ahead
from keel.training.batch import batch_from_groups, micro_batches, split
from keel.training.buffer import STREAMS, Collected
from keel.training.ranks import ALONE, Ranks
from keel.training.ray_rollouts import RayRollouts
from keel.training.rollouts import InTurn, Rollouts, Sampler, of_first
from keel.training.step import Gradient, accumulate_gradient, apply_gradient, learning_rate, look
from keel.training.tokens import TokenTrace, groups_to_trace, trace
from keel.types import Batch, Group, StepCounts


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, told.

    Args:
        step: 1 for the first.
        metrics: by the names of `docs/metrics.md`.
        groups: of the rollout batch, on its first update; empty on later updates of the same batch.
        batch_ends: whether the next step samples anew, and the trainer's state can be saved.
        skipped: name of the tensor whose gradient was not finite; "" for a normal step.
        traces: single tokens of a few completions, in batches where the settings ask for them.
    """

    step: int
    metrics: dict[str, float]
    groups: Sequence[Group] = field(default=(), repr=False)
    batch_ends: bool = True
    skipped: str = ""
    traces: Sequence[TokenTrace] = field(default=(), repr=False)


class Trainer:
    """Everything that training changes, and that a checkpoint must hold: weights, optimizer, clocks and the place in the data.

    Args:
        policy: trained in place.
        engine: samples; is handed the new weights after every batch.
        task: prompts and reward.
        recipe: the objective, and what it asks of the loop.
        config: the run.
        ranks: that train it together; every one has a trainer of its own, and all do the same.
    """

    def __init__(self, policy: Policy, engine: Engine, task: Task, recipe: Recipe, config: RunConfig, ranks: Ranks = ALONE):
        self.policy, self.engine, self.task, self.recipe, self.config = policy, engine, task, recipe, config
        self.objective: Objective = recipe.objective
        self.ranks = ranks
        if config.train.routing_replay != "none":
            check_replayable(policy.name, policy.base.config, policy.routing)
        self.sampling = config.sampling.distribution()
        self.stream = STREAMS[config.train.curriculum](task.train, config.seed)
        self.step = self.updates = self.batch = self.tokens = self.skipped = 0
        settings = config.train
        self.reference = _reference(policy, ranks, settings.device) if "logp_ref" in self.objective.needs else None
        ranks.cut(policy, settings.device)
        self.parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.updates_per_batch = settings.updates_per_batch or recipe.updates_per_batch
        dynamic = settings.dynamic_sampling
        self.dynamic_sampling = recipe.dynamic_sampling if dynamic is None else dynamic
        self._rollouts: Rollouts | None = None

    @property
    def rollouts(self) -> Rollouts:
        """Where batches come from; begun when it is first asked for, from the weights and clocks of then."""
        if self._rollouts is None:
            self._rollouts = self._begin_rollouts()
        return self._rollouts

    def close(self) -> None:
        """End whatever works in the background."""
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None

    def wake(self) -> None:
        """Give the engine in this process the newest weights, so that it can be evaluated."""
        if self.config.samples_apart and self.engine.version != self.step:
            self.engine.load(self.policy.weights(), self.step)

    def _begin_rollouts(self) -> Rollouts:
        if self.config.samples_apart:
            self.engine.sleep()
            source, weights = RayRollouts if self.config.cluster.ray else Ahead, self.policy.weights()
            return of_first(self.ranks, self.stream, lambda: source(self.config, weights, self.step, self.stream))
        what = self.engine, self.policy, self.task, self.stream, self.config
        return InTurn(Sampler(*what, self.dynamic_sampling, self.updates_per_batch, self.ranks))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and clocks from which `restore` goes on bit for bit. Draws are keyed by the clocks, so no generator is stored."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        held = getattr(self.engine, "held", {})  # an engine that is out of step on purpose goes on with the weights it has
        tensors |= {f"engine.{name}": tensor for name, tensor in held.items()}
        tensors |= {f"stream.{name}": tensor for name, tensor in self.stream.state().items()}
        clocks = {k: getattr(self, k) for k in ("step", "updates", "batch", "tokens", "skipped")}
        return tensors, {**clocks, "prompts_taken": self.stream.taken, "version": self.engine.version} | (
            {"engine_behind": self.engine.behind} if held else {}
        )

    def cut_tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint, how tensors are cut over ranks: an optimizer's states as the weights are."""
        if not self.ranks.sharded:
            return {}
        kinds = (("weights.", ""), ("optimizer.", ".exp_avg"), ("optimizer.", ".exp_avg_sq"))
        return {f"{before}{name}{after}": p.detach() for name, p in self.parameters.items() for before, after in kinds}

    def restore(self, tensors: dict[str, Tensor], clocks: dict[str, int]) -> None:
        """Take the state of a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(cut_like(parameter, tensors[f"weights.{name}"]))
                prefix = f"optimizer.{name}."
                kept = {k.removeprefix(prefix): cut_like(parameter, v).clone() for k, v in tensors.items() if k.startswith(prefix)}
                if kept:
                    self.optimizer.state[parameter] = kept
        for name in ("step", "updates", "batch", "tokens", "skipped"):
            setattr(self, name, clocks[name])
        self.stream.taken = clocks["prompts_taken"]
        self.stream.restore({name.removeprefix("stream."): t for name, t in tensors.items() if name.startswith("stream.")})
        self.close()
        held = {name.removeprefix("engine."): tensor for name, tensor in tensors.items() if name.startswith("engine.")}
        if held:
            self.engine.take(held, clocks["version"])
            self.engine.behind = clocks["engine_behind"]
        else:
            self.engine.load(self.policy.weights(), clocks["version"])


def iterate(trainer: Trainer) -> Iterator[StepRecord]:
    """Train until `config.steps` optimizer steps are done, one StepRecord each.

    Raises:
        KeelError: no full batch of live groups could be collected, or nothing could be scored.
    """
    while trainer.step < trainer.config.steps:
        start = time.perf_counter()
        collected = trainer.rollouts.collect(trainer.step)
        trainer.tokens += collected.generated_tokens
        rollout = _rollout_metrics(trainer, collected, time.perf_counter() - start)
        batch = _with_log_probabilities(trainer, batch_from_groups(collected.groups))
        prepared = trainer.objective.prepare(batch, trainer.sampling.max_completion_tokens)
        groups: Sequence[Group] = collected.groups
        wanted = groups_to_trace(trainer.config.record, trainer.batch, len(collected.groups))
        updates = _updates(batch, trainer.updates_per_batch)[: trainer.config.steps - trainer.step]
        for number, rows in enumerate(updates, start=1):
            part = batch.rows(rows), prepared.rows(rows)
            metrics, skipped, seen = _update(trainer, *part)
            traces = trace(trainer.policy.tokenizer, collected.groups, wanted, rows, *part, *seen) if wanted else ()
            ends = number == len(updates)
            if ends:
                trainer.batch += 1
                trainer.rollouts.publish(trainer.policy.weights(), trainer.step)
            now = time.perf_counter()
            yield StepRecord(trainer.step, rollout | metrics | {"time/step_s": now - start}, groups, ends, skipped, traces)
            start, groups, rollout = time.perf_counter(), (), {}


def _rollout_metrics(trainer: Trainer, collected: Collected, seconds: float) -> dict[str, float]:
    spent = {f"judge/{name}": value for name, value in collected.spent.items()}
    return (
        {
            "time/rollout_s": seconds,
            "tokens/batch": collected.generated_tokens,
            "tokens/total": trainer.tokens,
            "sampling/groups_dropped": collected.dropped,
        }
        | part_metrics(collected.groups)
        | spent
        | collected.told
    )


def _with_log_probabilities(trainer: Trainer, batch: Batch) -> Batch:
    """Add what must be known before the first update: the trainer at the sampling weights, and the reference.

    With one update a batch the first is the update's own forward pass; on the probe's beat it is computed apart all the same, so
    that "on-policy" is measured (`policy/off_policy_frac`), not assumed. Bypassed, logp_old is what the engine said: the gap is 0
    by definition, and the ratio of the loss is π/μ. Routing is replayed in every forward pass of the policy's (R3), or in those of
    the updates (R2); the reference chooses its own experts.
    """
    settings, replay = trainer.config.train, trainer.config.train.routing_replay
    updates = _updates(batch, trainer.updates_per_batch)  # cut as they will be cut, so that equal weights give equal bits
    share = _share(trainer, batch, [rows for rows in updates if len(rows)])  # a batch may hold fewer prompts than updates
    probe = settings.probe_every > 0 and trainer.batch % settings.probe_every == 0
    several = trainer.updates_per_batch > 1
    asked = not settings.bypass_old and (probe or several or "logp_old" in trainer.objective.needs)
    if trainer.reference is not None:
        with trainer.reference() as reference:
            batch = replace(batch, logp_ref=_look(trainer, reference, batch, share).logp)
    if replay == "R3":
        check_recorded(batch.experts_rollout, trainer.policy.routing)
        batch = replace(batch, experts=batch.experts_rollout)
    if asked or (replay == "R2" and several):  # a first update chooses as the sampling weights do: nothing to replay
        seen = _look(trainer, trainer.policy, batch, share)
        batch = replace(batch, logp_old=seen.logp, experts_old=seen.experts)
    if settings.bypass_old:
        batch = replace(batch, logp_old=batch.logp_rollout)
    return replace(batch, experts=batch.experts_old) if replay == "R2" else batch


def _updates(batch: Batch, updates: int) -> list[Tensor]:
    """Row indices of each optimizer step: whole groups, in order, the same number of groups each."""
    groups = torch.unique(batch.group)
    return [torch.isin(batch.group, part).nonzero()[:, 0] for part in torch.tensor_split(groups, updates)]


@dataclass(frozen=True)
class _Share:
    """What one rank computes of a batch: its micro-batches, all their rows, and how many passes it only stands by."""

    cuts: Sequence[Tensor]
    rows: Tensor
    idle: int


def _share(trainer: Trainer, batch: Batch, updates: Sequence[Tensor]) -> _Share:
    """This rank's part of some updates. Where weights are cut, every rank has to make as many passes as the busiest one."""
    ranks, cap = trainer.ranks, trainer.config.train.micro_batch_tokens
    of_ranks: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    for update in updates:
        for cuts, mine in zip(of_ranks, split(batch, ranks.size, update), strict=True):
            cuts += [part for part in micro_batches(batch, cap, mine) if len(part)]
    cuts = of_ranks[ranks.rank]
    busiest = max(map(len, of_ranks)) if ranks.sharded else len(cuts)
    return _Share(cuts, torch.cat([batch.group.new_empty(0), *cuts]), busiest - len(cuts))


def _look(trainer: Trainer, policy: Policy, batch: Batch, share: _Share) -> TokenLogp:
    """`look` of all rows, by all ranks."""
    seen = look(policy, batch, share.cuts, trainer.sampling.temperature, share.idle)
    return TokenLogp(*trainer.ranks.complete((seen.logp, seen.entropy, seen.experts), share.rows))


def _gradient(trainer: Trainer, batch: Batch, prepared: Prepared, counts: StepCounts) -> Gradient:
    """`accumulate_gradient` over all rows, by all ranks; afterwards every rank has the whole gradient, or its part of it."""
    share = _share(trainer, batch, [torch.arange(len(batch))])
    whole = trainer.policy, trainer.objective, batch, prepared, counts
    mine = accumulate_gradient(*whole, share.cuts, trainer.sampling.temperature, share.idle)
    trainer.ranks.add_up(list(trainer.parameters.values()))
    loss = trainer.ranks.sums({"loss": mine.loss})["loss"]
    return Gradient(loss, *trainer.ranks.complete((mine.logp, mine.entropy, mine.experts), share.rows))


def _update(trainer: Trainer, batch: Batch, prepared: Prepared) -> tuple[dict[str, float], str, tuple[Tensor, Tensor]]:
    """One optimizer step on these rows: its metrics, the name of a tensor whose gradient was not finite ("" if none), and the
    log-probabilities and entropies [B, T] that its loss saw.
    """
    begin = time.perf_counter()
    config, objective = trainer.config, trainer.objective
    counts = objective.counts(batch, prepared, trainer.sampling.max_completion_tokens)
    gradient = _gradient(trainer, batch, prepared, counts)
    rate = learning_rate(config.train.lr, config.train.lr_schedule, config.train.warmup_steps, trainer.updates, config.steps)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    age = (trainer.step - batch.versions)[prepared.mask].float()
    applied = apply_gradient(trainer.parameters, trainer.optimizer, config.train.max_grad_norm)
    trainer.step += 1
    trainer.updates += not applied.non_finite
    trainer.skipped += bool(applied.non_finite)
    metrics = measure(batch, prepared, gradient.logp, gradient.entropy, objective, counts) | {
        "train/loss": gradient.loss,
        "train/grad_norm": applied.grad_norm,
        "train/lr": rate,
        "train/skipped_steps": float(trainer.skipped),
        "train/staleness_mean": float(age.mean()) if len(age) else 0.0,
        "train/staleness_max": float(age.max()) if len(age) else 0.0,
        "time/train_s": time.perf_counter() - begin,
    }
    if gradient.experts is not None:
        metrics |= measure_routing(batch, prepared, gradient.experts, trainer.policy.routing.experts)
    return metrics, applied.non_finite, (gradient.logp, gradient.entropy)


def _reference(policy: Policy, ranks: Ranks, device: str) -> Callable[[], AbstractContextManager[Policy]]:
    """Where the policy stands now, to be asked later: a frozen copy, or, for fresh adapters, the policy with them switched off."""
    if policy.model is not policy.base:
        if started_from_zero(policy.model):

            @contextmanager
            def without_adapters() -> Iterator[Policy]:
                with reference(policy.model):
                    yield policy

            return without_adapters
    frozen = policy.over(plain_copy(policy.model))
    ranks.cut(frozen, device)
    return lambda: nullcontext(frozen)
