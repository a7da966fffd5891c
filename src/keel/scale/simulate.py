"""A run as a few queues: workers sample parts of batches, trainers learn from whole ones, the bound on staleness ties them.

Time goes from event to event; in between, every process that has work does it, at the share of a core that so many at once have.
Lengths of completions are drawn from measured groups, so that the longest one of a part, for which its worker waits, is a true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

INFINITE = float("inf")
RAY_WORKER = 1.25**-15  # the weight of a process that is 15 times nice, as Ray starts them

UNTIL_STEADY = 10  # batches that are simulated and not counted


@dataclass(frozen=True)
class Costs:
    """Seconds of a core, each of one process with its machine to itself: what it computes, not what it waits.

    Args:
        part_s: of a part of a batch, whatever its size: the call, the prompts, fetching and grading what is small.
        round_s: one more token of the longest completion: a pass of the model over a part, whatever its size.
        token_s: one more sampled token.
        load_s: taking new weights.
        hand_s: one completion's way from worker to trainer; half of it on each side.
        step_s: an optimizer step, whatever the size of its batch: optimizer, metrics, writing.
        train_s: one completion token in training: log-probabilities, forward and backward.
    """

    part_s: float
    round_s: float
    token_s: float
    load_s: float
    hand_s: float
    step_s: float
    train_s: float


@dataclass(frozen=True)
class Plan:
    """Who works, and on what.

    Args:
        prompts: of one optimizer step.
        group_size: completions of each.
        updates: optimizer steps of a batch.
        bound: versions by which a batch may be stale at its last update; `updates` − 1 is sampling in turn.
        workers: that sample; parts of a batch.
        trainers: among which a step's tokens are divided.
        cores: [k − 1] = how many of them k processes at work have together, beside what others do there; the last one holds for
            more. Infinitely many are a machine for each.
        crowding: by how much work takes longer where more than one process is at it: memory and caches are shared too.
        worker_weight: a worker's claim to a core beside a trainer's, of 1: Ray has its workers give way to others (`RAY_WORKER`).
    """

    prompts: int
    group_size: int
    updates: int = 1
    bound: int = 0
    workers: int = 1
    trainers: int = 1
    cores: tuple[float, ...] = (INFINITE,)
    crowding: float = 1.0
    worker_weight: float = 1.0

    def shares(self, weights: Sequence[float]) -> list[float]:
        """Of a core, for each process that is at work: none has more than one, and what one leaves goes to the others by their
        weights.
        """
        cores = self.cores[min(len(weights), len(self.cores)) - 1]
        crowd = self.crowding if len(weights) > 1 else 1.0
        return [share / crowd for share in _divided(weights, cores)]


def _divided(claims: Sequence[float], cores: float) -> list[float]:
    """Cores by claims, one at most to each."""
    given, waiting = [0.0] * len(claims), set(range(len(claims)))
    while waiting:
        each = cores / sum(claims[i] for i in waiting)
        full = {i for i in waiting if claims[i] * each >= 1.0}
        for i in full or waiting:
            given[i] = 1.0 if full else claims[i] * each
        cores -= len(full)
        waiting = waiting - full if full else set()
    return given


@dataclass(frozen=True)
class Forecast:
    """Of a long run.

    Args:
        step_s: seconds of an optimizer step.
        sampling, loading: share of time in which a worker samples, and takes weights.
        training, waiting: the same of the trainer: at work, and waiting for a batch.
        staleness: mean versions between the weights that a part began with and its batch's first update.
    """

    step_s: float
    sampling: float
    loading: float
    training: float
    waiting: float
    staleness: float

    @property
    def bottleneck(self) -> str:
        """What to have more of, first: whoever waits least."""
        return "training" if self.training > self.sampling + self.loading else "rollout"


@dataclass
class _Process:
    """Work that is left, by kind, in the order in which it is done."""

    left: list[tuple[str, float]] = field(default_factory=list)
    part: int = -1  # batch that a worker works on
    version: int = 0  # weights that a worker has
    spent: dict[str, float] = field(default_factory=dict)


class _Run:
    """The state of a simulated run."""

    def __init__(self, plan: Plan, costs: Costs, lengths: Sequence[Sequence[int]], rng: np.random.Generator):
        self.plan, self.costs, self.lengths, self.rng = plan, costs, lengths, rng
        self.now = 0.0
        self.version = self.asked = self.used = 0  # clocks: optimizer steps, batches asked for, batches trained on
        self.trainer, self.workers = _Process(), [_Process() for _ in range(plan.workers)]
        self.pieces: list[tuple[int, np.ndarray]] = []  # (batch, lengths of its completions), oldest first
        self.missing: dict[int, int] = {}  # parts that a batch still lacks
        self.tokens: dict[int, list[int]] = {}  # (tokens, completions) of a batch
        self.ages: list[int] = []

    def ask(self) -> None:
        """Open every batch that the bound lets begin."""
        plan = self.plan
        while (self.asked + 1) * plan.updates - 1 - self.version <= plan.bound:
            chosen = self.rng.integers(len(self.lengths), size=plan.prompts * plan.updates)
            parts = np.array_split(chosen, min(plan.workers, len(chosen)))
            drawn = [np.concatenate([np.asarray(self.lengths[i]) for i in part]) for part in parts]
            self.pieces += [(self.asked, part) for part in drawn]
            self.missing[self.asked] = len(drawn)
            self.tokens[self.asked] = [sum(int(part.sum()) for part in drawn), sum(map(len, drawn))]
            self.asked += 1

    def give(self) -> None:
        """Parts to idle workers, a whole batch to an idle trainer."""
        c = self.costs
        for worker in (w for w in self.workers if not w.left and self.pieces):
            worker.part, lengths = self.pieces.pop(0)
            work = c.part_s + c.round_s * int(lengths.max()) + c.token_s * int(lengths.sum()) + c.hand_s / 2 * len(lengths)
            worker.left = [("load", c.load_s if worker.version != self.version else 0.0), ("sample", work)]
            worker.version = self.version
            self.ages.append(worker.part * self.plan.updates - self.version)
        if not self.trainer.left and self.missing.get(self.used) == 0:
            tokens, completions = self.tokens.pop(self.used)
            work = c.step_s * self.plan.updates + c.train_s * tokens / self.plan.trainers + c.hand_s / 2 * completions
            self.trainer.left = [("train", work)]

    def advance(self) -> None:
        """Until the next piece of work ends."""
        busy = [process for process in (self.trainer, *self.workers) if process.left]
        shares = self.plan.shares([1.0 if process is self.trainer else self.plan.worker_weight for process in busy])
        seconds = min(process.left[0][1] / share for process, share in zip(busy, shares, strict=True))
        self.now += seconds
        for process, share in zip(busy, shares, strict=True):
            kind, left = process.left[0]
            process.spent[kind] = process.spent.get(kind, 0.0) + seconds
            process.left[0] = kind, left - seconds * share
            while process.left and process.left[0][1] <= 1e-12:
                process.left.pop(0)
            if not process.left:
                self._ended(process)

    def _ended(self, process: _Process) -> None:
        if process is self.trainer:
            self.used += 1
            self.version += self.plan.updates
        else:
            self.missing[process.part] -= 1

    def until(self, batches: int) -> None:
        while self.used < batches:
            self.ask()
            self.give()
            self.advance()


def simulate(plan: Plan, costs: Costs, lengths: Sequence[Sequence[int]], *, seed: int = 0, batches: int = 200) -> Forecast:
    """What a long run comes to.

    Args:
        lengths: tokens of the completions of measured groups, a row each.
        batches: that are counted.
    """
    run = _Run(plan, costs, lengths, np.random.default_rng(seed))
    run.until(UNTIL_STEADY)
    begin, spent = run.now, [dict(process.spent) for process in (run.trainer, *run.workers)]
    run.until(UNTIL_STEADY + batches)
    seconds = run.now - begin

    def share(kind: str, which: slice) -> float:
        processes = (run.trainer, *run.workers)[which]
        done = [p.spent.get(kind, 0.0) - before.get(kind, 0.0) for p, before in zip(processes, spent[which], strict=True)]
        return sum(done) / seconds / len(processes)

    trainer, workers = slice(0, 1), slice(1, None)
    training = share("train", trainer)
    return Forecast(
        step_s=seconds / batches / plan.updates,
        sampling=share("sample", workers),
        loading=share("load", workers),
        training=training,
        waiting=1.0 - training,
        staleness=float(np.mean(run.ages)),
    )
