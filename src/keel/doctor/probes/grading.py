"""How training has texts graded: many at once, in bounded time, and the policy's own words as they are."""

from __future__ import annotations

import multiprocessing
import time

from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.probes.data import answered
from keel.doctor.probes.reward import BUDGET_S, MOST, costly, differ, raised, spread, unknown
from keel.doctor.subject import Subject
from keel.tasks.task import Task, reward_many
from keel.types import Finish, Prompt

LIMIT_S = 3.0  # within which any text must have its verdict
MOST_AT_ONCE = 1024  # texts that are graded together
ENDLESS = ("\\boxed{\\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}", "A:9**9**9**9", "(" * 5_000 + ")" * 5_000, "a" * 30_000 + "!")


def threads(subject: Subject) -> Check:
    """The same texts graded twice one by one, and as training has them graded: equal verdicts."""
    task = subject.task
    if (why := costly(task)) is not None:
        return Check("threads", "", skipped=why)
    texts = [(g.prompt, c.text, c.finish) for g in subject.groups for c in g.completions if c.finish != "error"][:48]
    if unknown(task) is None:
        texts += [(p, task.gold(p), "stop") for p in spread(task.train, 48)]
    texts = list({(p.id, text): (p, text, finish) for p, text, finish in texts}.values())
    try:
        begun = time.perf_counter()
        first = [task.reward(*each) for each in texts]
        seconds = (time.perf_counter() - begun) / len(texts)
        second = [task.reward(*each) for each in texts]
        texts += _as_many_as_training(subject, len(texts), seconds)
        first += [task.reward(*each) for each in texts[len(first) :]]
        together = reward_many(task, texts)
    except Exception as error:
        return raised("threads", error, "a completion")
    changed = differ(first[: len(second)], second)
    if changed:
        says = f"{changed} of {len(texts)} verdicts change when the same text is graded again"
        return Check("threads", says, (Finding(fault("K462"), says, float(changed), 0.0),))
    apart = differ(first, together)
    if apart:
        says = f"{apart} of {len(texts)} verdicts differ between grading one by one and grading as training does"
        lost = sum(a.correct and not b.correct for a, b in zip(first, together, strict=True))
        code = "K418" if lost == apart and lost == sum(a.correct for a in first) else "K485"
        return Check("threads", says, (Finding(fault(code), says, float(apart), 0.0),))
    return Check("threads", f"{len(texts)} verdicts are the same again, and the same as training has them graded")


def _as_many_as_training(subject: Subject, there: int, seconds: float) -> list[tuple[Prompt, str, Finish]]:
    """Gold answers of other prompts, until there are as many texts as a batch of training grades at once and time allows."""
    if unknown(subject.task) is not None:
        return []
    train, prompts = subject.config.train, subject.task.train
    most = min(train.prompts_per_step * train.group_size, MOST_AT_ONCE, int(BUDGET_S / 4 / max(seconds, 1e-6)))
    return [(p, subject.task.gold(p), "stop") for p in spread(prompts, max(0, most - there))]


def endings(subject: Subject) -> Check:
    """Completions of its own that end with the whole gold text, with other text before it: they are right."""
    task = subject.task
    if (why := unknown(task) or costly(task)) is not None:
        return Check("endings", "", skipped=why)
    told, lost, seen = answered(subject), "", []
    for prompt, row, scores in zip(told.prompts, told.completions, told.scores, strict=True):
        gold = task.gold(prompt).strip()
        for c, score in zip(row, scores, strict=True):
            text = c.text.strip()
            if (
                c.finish == "stop"
                and score.scorable
                and gold
                and text.endswith(gold)
                and text[-len(gold) - 1 : -len(gold)].isspace()
            ):
                seen.append(score.correct)
                lost = lost if score.correct else text
    says = f"{sum(seen)} of {len(seen)} completions that end with the gold answer, after other text, are right"
    if len(seen) - sum(seen) < max(5, MOST * len(seen)):
        return Check("endings", says)
    says = f"{says}; not so {lost[-60:]!r}"
    return Check("endings", says, (Finding(fault("K482"), says, sum(seen) / len(seen), 1.0),))


def hangs(subject: Subject) -> Check:
    """Texts that send a parser into the woods: a verdict within the bound, each asked in a process that can be ended."""
    task = subject.task
    if (why := costly(task)) is not None:
        return Check("hangs", "", skipped=why)
    slow, worst = [], 0.0
    for text in ENDLESS:
        begun = time.perf_counter()
        if not _ends(task, task.train[0], text):
            slow.append(text)
        worst = max(worst, time.perf_counter() - begun)
    if slow:
        says = f"{slow[0][:50]!r} has no verdict after {LIMIT_S:g} s"
        return Check("hangs", says, (Finding(fault("K419"), says, worst, LIMIT_S),))
    return Check("hangs", f"{len(ENDLESS)} texts that take for ever to work out have a verdict within {worst:.1f} s")


def _ends(task: Task, prompt: Prompt, text: str) -> bool:
    """Whether there is a verdict, or an exception, within the limit."""
    child = multiprocessing.get_context("fork").Process(target=_graded, args=(task, prompt, text), daemon=True)
    child.start()
    child.join(LIMIT_S)
    ended = not child.is_alive()
    if not ended:
        child.kill()
    child.join()
    child.close()
    return ended


def _graded(task: Task, prompt: Prompt, text: str) -> None:
    try:
        task.reward(prompt, text, "stop")
    except Exception:
        return  # it ended; what it raises is for `junk` to tell
