"""Make training data: candidates, verified gold, pass rates of a model, a selection, and a card that tells every number."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from keel.data.near import near_pairs, normalised
from keel.data.select import Candidate, Chosen, select
from keel.data.sources import Source, sources
from keel.data.verify import verify
from keel.errors import KeelError
from keel.evaluate.suite import grade
from keel.models.policy import Policy
from keel.rollout.engine import Engine, Seed
from keel.tasks.task import get_task
from keel.types import Prompt, Sampling

AT_ONCE = 256  # prompts that are sampled together; time is looked at in between
MOST = 50_000  # candidates
MEASURE, AGAIN = 2**30, 2**30 + 1  # steps that draws are made under: never training's nor evaluation's


@dataclass(frozen=True)
class Plan:
    """What to make.

    Args:
        specs: tasks whose training prompts are candidates.
        size: rows wanted.
        pool: candidates that are measured, at most.
        samples: completions of each.
        low, high: pass rates between which a candidate is of use; both ends are.
        variations: whether tasks that can be varied are (other sizes, other wordings).
        against: tasks whose held-out prompts must not come in, besides those of `specs`.
        minutes: after which no more candidates are measured.
    """

    specs: tuple[str, ...]
    size: int
    pool: int = 2000
    samples: int = 8
    low: float = 0.1
    high: float = 0.9
    variations: bool = False
    against: tuple[str, ...] = ()
    minutes: float = 20.0
    seed: int = 0
    sampling: Sampling = field(default_factory=lambda: Sampling(max_completion_tokens=48))

    def __post_init__(self):
        if not self.specs or not 1 <= self.size <= self.pool <= MOST or self.samples < 2 or self.minutes <= 0:
            raise KeelError(
                f"keel data build was asked for {self.size} of {self.pool} candidates of {len(self.specs)} tasks, {self.samples} "
                f"samples each. Expected a task, 1 ≤ size ≤ pool ≤ {MOST:,}, at least 2 samples and some time."
            )
        if not 0 <= self.low <= self.high <= 1:
            raise KeelError(f"Pass rates from {self.low} to {self.high} were asked for. Expected 0 ≤ low ≤ high ≤ 1.")


@dataclass(frozen=True)
class Pool:
    """Candidates before they are measured.

    Args:
        rejected: source → reason → how many.
    """

    candidates: tuple[Candidate, ...]
    sources: tuple[Source, ...]
    held_out: tuple[Prompt, ...]
    rejected: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Built:
    """What came of it.

    Args:
        measured: every candidate with its pass rate.
        chosen: the data.
        control: as many candidates drawn without looking at pass rates: what selection is to be compared with.
        again, control_again: both measured anew with fresh samples, for a pass rate that was selected for is flattered.
        stopped: whether time was up before all candidates were measured.
    """

    plan: Plan
    pool: Pool
    measured: tuple[Candidate, ...]
    chosen: Chosen
    control: tuple[Candidate, ...]
    again: tuple[Candidate, ...]
    control_again: tuple[Candidate, ...]
    seconds: float
    stopped: bool


def build(plan: Plan, policy: Policy, engine: Engine, say: Callable[[str], None] = lambda line: None) -> Built:
    """Make the data. The same plan and weights give the same rows, unless time stopped it.

    Raises:
        KeelError: a task is unknown, or fewer candidates than asked for are of use.
    """
    begun = time.perf_counter()
    pool = candidates(plan)
    say(f"{len(pool.candidates):,} candidates of {len(pool.sources)} sources have verified answers and stand nowhere held out")
    if len(pool.candidates) < plan.size:
        raise KeelError(f"There are {len(pool.candidates)} candidates for {plan.size} rows. Name more tasks, or use --variations.")
    measured, stopped = measure(plan, pool, pool.candidates, policy, engine, MEASURE, begun + 60 * plan.minutes, say)
    chosen = select(measured, plan.size, plan.low, plan.high, plan.seed)
    if len(chosen.candidates) < plan.size:
        raise KeelError(
            f"Only {len(chosen.candidates)} of {len(measured)} candidates are of use for {plan.size} rows (others: {chosen.left}). "
            "Raise --pool, widen --low and --high, name other tasks, or ask for fewer rows."
        )
    control = tuple(random.Random(f"control {plan.seed}").sample(measured, plan.size))
    again, _ = measure(plan, pool, chosen.candidates, policy, engine, AGAIN)
    control_again, _ = measure(plan, pool, control, policy, engine, AGAIN)
    seconds = time.perf_counter() - begun
    return Built(plan, pool, tuple(measured), chosen, control, tuple(again), tuple(control_again), seconds, stopped)


def candidates(plan: Plan) -> Pool:
    """At most `plan.pool` verified questions, from all sources alike; no copies, none near to a held-out one."""
    listed = [source for spec in plan.specs for source in sources(spec, plan.variations, plan.pool)]
    named = {source.name: source for source in sorted(listed, key=lambda source: source.of, reverse=True)}
    found = list({source.name: named[source.name] for source in listed}.values())  # each once, as itself and not as a variation
    held = [prompt for source in found if not source.of for prompt in source.task.test]
    held += [prompt for spec in plan.against for prompt in get_task(spec).test]
    closed = {normalised(prompt.text) for prompt in held}
    drawn = [_drawn(source, plan.seed) for source in found]
    rejected: dict[str, Counter[str]] = {source.name: Counter() for source in found}
    taken: list[Candidate] = []
    for turn in range(max(map(len, drawn), default=0)):
        for source, prompts in zip(found, drawn, strict=True):
            if turn < len(prompts) and len(taken) < plan.pool:
                why = _take(source, prompts, turn, closed, taken)
                rejected[source.name].update([why] if why else [])
    near = _near(taken, held)
    for place in near:
        rejected[taken[place].source]["nearly a copy, or nearly held out"] += 1
    kept = tuple(c for place, c in enumerate(taken) if place not in near)
    return Pool(kept, tuple(found), tuple(held), {name: dict(counts) for name, counts in rejected.items()})


def _near(taken: Sequence[Candidate], held: Sequence[Prompt]) -> set[int]:
    """Places of questions that are nearly one that was taken before, or nearly a held-out one."""
    pairs = near_pairs([c.prompt.text for c in taken] + [prompt.text for prompt in held])
    return {j if j < len(taken) else i for i, j, _ in pairs if i < len(taken)}


def _drawn(source: Source, seed: int) -> list[Prompt]:
    prompts = list(source.task.train)
    random.Random(f"{source.name} {seed}").shuffle(prompts)
    return prompts


def _take(source: Source, prompts: Sequence[Prompt], turn: int, closed: set[str], taken: list[Candidate]) -> str:
    """Add a question to those taken, and its text to those closed; or say why not."""
    prompt = prompts[turn]
    text = normalised(prompt.text)
    if text in closed:
        return "a copy, or held out"
    verdict = verify(source.task, prompt, prompts[turn - 1])
    if verdict not in ("recomputed", "graded"):
        return f"gold is {verdict}"
    closed.add(text)
    taken.append(Candidate(prompt, source.name, verdict))
    return ""


def measure(
    plan: Plan, pool: Pool, some: Sequence[Candidate], policy: Policy, engine: Engine, step: int,
    until: float = float("inf"), say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Candidate], bool]:  # fmt: skip
    """The same candidates with how often a model solves them, in their order; and whether time was up before the last.

    Args:
        step: that the draws are made under.
        until: on the clock of `time.perf_counter`.
    """
    tasks = {source.name: source.task for source in pool.sources}
    found: dict[int, Candidate] = {}
    for name, task in tasks.items():
        mine = [place for place, c in enumerate(some) if c.source == name]
        for start in range(0, len(mine), AT_ONCE):
            if time.perf_counter() > until:
                return [found[place] for place in sorted(found)], True
            places = mine[start : start + AT_ONCE]
            prompts = [policy.template.render(some[place].prompt, policy.tokenizer) for place in places]
            for place, row in zip(
                places, grade(engine, prompts, task, plan.sampling, plan.samples, Seed(plan.seed, step)), strict=True
            ):
                scored = sum(score.scorable for score in row.scores)
                found[place] = replace(some[place], right=row.right, tries=scored)
            say(f"{name}: {min(start + AT_ONCE, len(mine)):,} of {len(mine):,} measured")
    return [found[place] for place in sorted(found)], False
