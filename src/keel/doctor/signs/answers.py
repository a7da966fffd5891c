"""What the stored completions say of data and reward: graded again, put to other prompts, counted."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from keel.data.near import normalised
from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.reward import of_golds
from keel.doctor.record import Record, Rollout, spread
from keel.rewards.compose import spent
from keel.tasks.task import reward_many
from keel.types import Score

AGAIN = 2048  # completions that are graded again
BUDGET_S = 6.0  # that one look spends grading; slow graders see fewer texts
BETTER = 0.5  # of a group's completions that another prompt's gold answer must suit more than its own


def verdicts(record: Record) -> Check:
    """Stored completions graded again by the run's own reward: the same scores."""
    if (why := _not_gradable(record)) is not None:
        return Check("stored scores", "", skipped=why)
    stored = [r for r in spread(record.rollouts, AGAIN) if r.finish != "error"]
    begun, fresh = time.perf_counter(), []
    try:
        for r in stored:
            fresh.append(_graded(record, r))
            if time.perf_counter() - begun > BUDGET_S:
                break
        stored = stored[: len(fresh)]
        differ = [i for i, (r, s) in enumerate(zip(stored, fresh, strict=True)) if not _same(r, s)]
        if not differ:
            return Check("stored scores", f"{len(stored)} stored completions are graded as they were")
        code, why = _explained(record, stored, fresh, differ)
    except Exception as error:  # whatever a reward of one's own raises
        says = f"the reward raises {type(error).__name__} on a stored completion: {str(error)[:100]}"
        return Check("stored scores", says, (Finding(fault("K489"), says, 1.0, 0.0),))
    says = f"{len(differ)} of {len(stored)} stored scores are not what the run's own reward gives now: {why}"
    return Check("stored scores", says, (Finding(fault(code), says, float(len(differ)), 0.0),))


def _explained(record: Record, stored: Sequence[Rollout], fresh: Sequence[Score], differ: Sequence[int]) -> tuple[str, str]:
    """The first cause that fits, as (code, words)."""
    again = [_graded(record, stored[i]) for i in differ]
    if any((a.value, a.correct) != (fresh[i].value, fresh[i].correct) for a, i in zip(again, differ, strict=True)):
        return "K462", "graded once more, they change again"
    together = reward_many(record.task, [(record.prompt_of(r), r.completion, r.finish) for r in stored])
    apart = [i for i, (a, b) in enumerate(zip(fresh, together, strict=True)) if (a.value, a.correct) != (b.value, b.correct)]
    if apart and all(fresh[i].correct and not together[i].correct for i in apart) and not any(s.correct for s in together):
        return "K418", "graded as training grades, nothing is right, and one by one something is"
    if apart:
        return "K485", "verdicts differ between grading one by one and grading as training does"
    if _moved(record):
        return "K151", "within every batch they are the same scores, at other completions"
    return "K468", "the grader has changed, or keeps something between calls"


def _moved(record: Record) -> bool:
    """Whether the scores of batches are right as a whole and wrong one by one."""
    wrong = 0
    for rollouts in list(record.batches.values())[:4]:
        rows = [r for r in rollouts if r.finish != "error"]
        fresh = [_graded(record, r) for r in rows]
        wrong += sum(not _same(r, s) for r, s in zip(rows, fresh, strict=True))
        if Counter(r.reward for r in rows) != Counter(s.value for s in fresh):
            return False
    return wrong > 0


def golds(record: Record) -> Check:
    """Gold answers of the very prompts that the run was asked, and gold answers of other prompts."""
    if (why := _not_gradable(record)) is not None:
        return Check("gold in the run", "", skipped=why)
    if getattr(record.task, "checked", 1) == 0:
        return Check("gold in the run", "", skipped="no completion of this task is known to be right")
    prompts = {r.prompt_id: record.prompt_of(r) for r in record.rollouts}
    check, _ = of_golds(record.task, spread(list(prompts.values()), 64))
    return Check("gold in the run", check.says, check.findings, check.skipped)


def pairs(record: Record) -> Check:
    """Whether groups answer other prompts of their batch better than their own, and more often than prompts of another batch.

    The other batch is the floor: nothing can have been swapped with it, so its share of such pairs is that of chance.
    """
    if (why := _not_gradable(record)) is not None:
        return Check("pairs in the run", "", skipped=why)
    begun, batches = time.perf_counter(), list(record.groups.values())
    within = floor = tried = tried_floor = 0
    for groups, others in zip(batches, [*batches[1:], batches[0]], strict=True):
        if time.perf_counter() - begun > BUDGET_S or others is groups:
            break
        hit, count = _suited(record, groups, groups)
        hit_floor, count_floor = _suited(record, groups, others)
        within, tried, floor, tried_floor = within + hit, tried + count, floor + hit_floor, tried_floor + count_floor
    if not tried or not tried_floor:
        return Check("pairs in the run", "", skipped="there are not two batches with wrong answers to compare")
    p = chance.more_of_two(within, tried, floor, tried_floor)
    says = f"{within} of {tried} pairs of a group and another prompt of its batch fit better than its own"
    says += f"; of {tried_floor} pairs with the next batch {floor} do"
    found = (Finding(fault("K151"), says, within / tried, floor / tried_floor, p),) if p < chance.ALPHA else ()
    return Check("pairs in the run", says, found)


def _suited(record: Record, groups: Sequence[Sequence[Rollout]], others: Sequence[Sequence[Rollout]]) -> tuple[int, int]:
    """(pairs of a group and another prompt in which that prompt's gold suits clearly more of its answers than its own, pairs)."""
    prompts = [record.prompt_of(other[0]) for other in others if other]
    hits = count = 0
    for group in groups:
        ended = [r for r in group if r.finish == "stop" and r.reward is not None]
        own = sum(r.correct for r in ended)
        if len(ended) < 2 or own > (1 - BETTER) * len(ended):
            continue
        for prompt in prompts:
            if normalised(prompt.answer) == normalised(group[0].answer):
                continue
            right = sum(record.task.reward(prompt, r.completion, "stop").correct for r in ended)
            hits += right - own >= BETTER * len(ended)
            count += 1
    return hits, count


def copies(record: Record) -> Check:
    """Questions that stand in one batch more than once, and with several gold answers."""
    if not record.groups:
        return Check("copies in batches", "", skipped="there are no stored completions")
    twins, torn = 0, set()
    for groups in record.groups.values():
        asked: dict[str, list[Rollout]] = defaultdict(list)
        for group in groups:
            asked[normalised(group[0].prompt)].append(group[0])
        twins += sum(math.comb(len(rows), 2) for rows in asked.values())
        torn |= {text for text, rows in asked.items() if len({normalised(r.answer) for r in rows}) > 1}
    per_batch = twins / len(record.groups)
    says = f"a batch holds {per_batch:.2f} pairs of copies of a question"
    if torn and getattr(record.task, "own_gold_only", True):
        what = f"{len(torn)} questions stand in one batch with several gold answers"
        return Check("copies in batches", what, (Finding(fault("K363"), what, float(len(torn)), 0.0),))
    if per_batch >= 1.0 and len(record.groups) > 1 and not torn:
        return Check("copies in batches", says, (Finding(fault("K365"), says, per_batch, 1.0),))
    return Check("copies in batches", says)


def _graded(record: Record, r: Rollout) -> Score:
    return record.task.reward(record.prompt_of(r), r.completion, r.finish)


def _same(r: Rollout, score: Score) -> bool:
    if r.reward is None or score.value is None or not math.isfinite(score.value):
        return r.reward is None and (score.value is None or not math.isfinite(score.value))
    return math.isclose(r.reward, score.value, rel_tol=1e-6, abs_tol=1e-6) and r.correct == score.correct


def _not_gradable(record: Record) -> str | None:
    if record.task is None:
        return "the task is not at hand, so nothing can be graded again"
    if not record.rollouts:
        return "there are no stored completions"
    return "its grader asks a server, which costs" if spent(getattr(record.task, "grade", None)) else None
