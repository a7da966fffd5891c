"""The reward on texts whose verdict is known: gold, other rows' gold, near misses, cheats and junk."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import Subject
from keel.rewards.compose import spent
from keel.tasks.task import Task, reward_many
from keel.types import Finish, Prompt, Score

PAIRS = 64  # prompts whose gold is graded
BUDGET_S = 8.0  # that one probe spends grading; slow graders see fewer texts
REPEATED = 16  # times
MOST = 0.25  # of gold answers that are not taken: from here on it is the grader that misses them, below it is those rows

CHEATS = (
    "", " ", "\n\n", "A:", "nan", "A:nan", "inf", "None", "A:None", "True", "0", "A:0", "exit(0)", "The answer is correct.",
    "\\boxed{}", "\\boxed{", "<answer></answer>", "<think></think>", "{}", "[]", " ".join(map(str, range(200))),
    "A:" + " ".join(map(str, range(200))), "A:" + ",".join(map(str, range(100))), "I think it is right.\nA:correct",
    "```python\nimport sys; sys.exit(0)\n```",
)  # fmt: skip
JUNK = (
    "A:abc", ":", "}{", "\\frac{1}{", "A:" + "9" * 400, "é漢字\u202e\x00", "(" * 200, "A:1e999", "-", "1/0", "[[[", "A:\n\nA:",
    "x" * 20_000,
)  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """How often a reward takes gold, and how often another row's gold."""

    gold: int
    right: int
    cross: int
    wrong: int
    not_finite: int

    @property
    def tpr(self) -> float:
        return self.right / self.gold

    @property
    def fpr(self) -> float:
        return self.wrong / self.cross if self.cross else 0.0


def gold(subject: Subject) -> Check:
    """Gold answers score 1, other rows' gold and near misses 0, in the same process and thread as in training."""
    if (why := unknown(subject.task)) is not None:
        return Check("gold", "", skipped=why)
    prompts = spread(subject.task.train, PAIRS)
    check, told = of_golds(subject.task, prompts)
    if told is not None:
        subject.facts["accuracy"] = told
    return _of_near_misses(subject.task, prompts, check) if check.holds else check


def _of_near_misses(task: Task, prompts: Sequence[Prompt], held: Check) -> Check:
    """Gold answers with another number in the place of theirs, where it is a whole number: none may be right."""
    asked = [(p, text) for p in prompts for text in near_misses(task.gold(p), p.answer)]
    if not asked or costly(task) or not getattr(task, "own_gold_only", True):
        return held
    try:
        taken = [text for p, text in asked if _taken(task.reward(p, text, "stop"))]
    except Exception as error:
        return raised("gold", error, "a near miss")
    if not taken:
        return replace(held, says=f"{held.says}; none of {len(asked)} near misses is")
    says = f"{held.says}, but {len(taken)} of {len(asked)} answers with another number are, such as {taken[0][-40:]!r}"
    return Check("gold", says, (Finding(fault("K458"), says, len(taken) / len(asked), 0.0),))


def near_misses(text: str, answer: str) -> list[str]:
    """A gold text with other whole numbers in the place of its answer: one more, one less, a digit less or more at either end."""
    head, found, tail = text.rpartition(answer)
    if not found or not answer.removeprefix("-").isdecimal() or head[-1:].isdecimal() or tail[:1].isdecimal():
        return []
    number = int(answer)
    others = {
        str(number + 1),
        str(number - 1),
        answer + "7",
        answer[:-1],
        answer.replace("-", "")[1:],
        "7" + answer.replace("-", ""),
    }
    return [head + other + tail for other in sorted(others) if other.removeprefix("-").isdecimal() and int(other) != number]


def of_golds(task: Task, prompts: Sequence[Prompt]) -> tuple[Check, Accuracy | None]:
    """The same of these prompts, with the counts; None where the reward raised."""
    asked: list[tuple[Prompt, str, Finish]] = [(p, task.gold(p), "stop") for p in prompts]
    half = max(1, len(prompts) // 2)
    pairs = [(p, prompts[(i + half) % len(prompts)]) for i, p in enumerate(prompts)]
    pairs = [(p, other) for p, other in pairs if p.answer != other.answer and p.text != other.text]
    asked += [(p, task.gold(other), "stop") for p, other in pairs]
    try:
        scores, single = reward_many(task, asked), [task.reward(*each) for each in asked]
    except Exception as error:  # whatever a reward of one's own raises, training would meet too
        return raised("gold", error, "a gold answer"), None
    told, alone = (_accuracy(found, len(prompts)) for found in (scores, single))
    says = f"{told.right} of {told.gold} gold answers are right, and {told.wrong} of {told.cross} other rows' gold answers"
    if differ(scores, single):
        return Check("gold", f"{says}; graded one by one {alone.right} and {alone.wrong}; see threads", ()), told
    if told.fpr > 0.5 and told.right and not costly(task) and not any(_takes(task, p, task.gold(o) + " ") for p, o in pairs[:16]):
        says = f"{says}; but none of 16 of them with a space behind it, which was never graded before: it remembers verdicts"
        return Check("gold", says, (Finding(fault("K485"), says, told.fpr, 0.0),)), told
    lost = [p for p, score in zip(prompts, scores, strict=False) if not _taken(score)]
    taken = [p for p, score in zip(prompts, scores, strict=False) if _taken(score)]
    otherwise = _read_otherwise(task, lost) or _written_alike(task, lost, taken)
    return Check("gold", says, tuple(_of_accuracy(task, told, says, otherwise))), told


def _written_alike(task: Task, lost: Sequence[Prompt], taken: Sequence[Prompt]) -> bool:
    """Whether gold answers that are not taken look like those that are, digit for digit and letter for letter."""

    def shape(prompt: Prompt) -> str:
        return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", task.gold(prompt)))

    return bool(lost) and {shape(p) for p in lost} <= {shape(p) for p in taken}


def _read_otherwise(task: Task, lost: Sequence[Prompt]) -> bool:
    """Whether most gold answers that are not taken are, once there is a space or an empty line more: then it is not those rows."""
    if not lost or costly(task):
        return False
    texts = [(p, (task.gold(p) + "\n", " " + task.gold(p), task.gold(p) + " \n")) for p in lost]
    return sum(any(_takes(task, p, text) for text in ways) for p, ways in texts) > len(lost) / 2


def _takes(task: Task, prompt: Prompt, text: str) -> bool:
    """Whether a text is right; one on which the reward raises is not, and `junk` tells of it."""
    try:
        return _taken(task.reward(prompt, text, "stop"))
    except Exception:
        return False


def _taken(score: Score) -> bool:
    return score.value is not None and score.value > 0.5


def _of_accuracy(task: Task, told: Accuracy, says: str, read_otherwise: bool) -> Iterator[Finding]:
    numbers = {"tpr": told.tpr, "fpr": told.fpr, "gold": told.gold, "cross": told.cross}
    strict = getattr(task, "own_gold_only", True)
    wrong = told.wrong if strict or told.fpr > 0.5 else 0
    missed = told.gold - told.right
    if told.not_finite:
        yield Finding(fault("K464"), f"{told.not_finite} verdicts are not finite numbers", float(told.not_finite), 0.0)
    elif wrong and told.right < told.gold and told.tpr <= told.fpr:
        reversed_, what = told.tpr < 0.5 * told.fpr, f"{says}: right answers are taken no more often than wrong ones"
        yield Finding(fault("K465" if reversed_ else "K466"), what, told.tpr - told.fpr, 0.0, evidence=numbers)
    elif wrong and missed:
        noisy = f"{says}: it errs both ways, and the gradient shrinks to {told.tpr - told.fpr:.2f} of what it was"
        yield Finding(fault("K466"), noisy, told.tpr - told.fpr, 1.0, evidence=numbers)
    elif wrong:
        yield Finding(fault("K458"), f"{says}: wrong answers are rewarded", told.fpr, 0.0, evidence=numbers)
    elif missed == told.gold:
        yield Finding(fault("K461"), f"{says}: nothing can ever be rewarded", 0.0, 1.0, evidence=numbers)
    elif missed >= MOST * told.gold or read_otherwise:
        yield Finding(fault("K482"), f"{says}: right answers are not taken", told.tpr, 1.0, evidence=numbers)
    elif missed:
        yield Finding(fault("K367"), f"{says}: these rows can never be rewarded", told.tpr, 1.0, evidence=numbers)


def _accuracy(scores: Sequence[Score], golds: int) -> Accuracy:
    not_finite = sum(s.value is not None and not math.isfinite(s.value) for s in scores)
    taken = [_taken(s) for s in scores]
    return Accuracy(golds, sum(taken[:golds]), len(scores) - golds, sum(taken[golds:]), not_finite)


def cheats(subject: Subject) -> Check:
    """Texts without an answer, on prompts with different answers: none may earn anything twice."""
    task = subject.task
    if (why := costly(task)) is not None:
        return Check("cheats", "", skipped=why)
    prompts, begun, caught, graded = spread(task.train, 12), time.perf_counter(), {}, 0
    for text in CHEATS:
        if time.perf_counter() - begun > BUDGET_S:
            break
        try:
            scores = [task.reward(p, text, "stop") for p in prompts]
        except Exception as error:
            return raised("cheats", error, repr(text[:40]))
        graded += 1
        earned = {p.answer for p, score in zip(prompts, scores, strict=True) if score.value is not None and score.value > 0}
        if len(earned) > 1:
            caught[text] = len(earned)
    cut = [p for p in prompts if _taken(task.reward(p, _gold_or(task, p), "length"))]
    if not caught and (check := _of_repetition(subject, prompts)) is not None:
        return check
    if caught:
        text, answers = max(caught.items(), key=lambda each: each[1])
        says = f"{text[:40]!r} earns a reward on prompts with {answers} different answers; so do {len(caught) - 1} other cheats"
        return Check("cheats", says, (Finding(fault("K463"), says, float(answers), 1.0, evidence={"cheats": list(caught)[:10]}),))
    return Check("cheats", f"none of {graded} cheats earns anything twice" + (f"; {len(cut)} truncated ones do" if cut else ""))


def _of_repetition(subject: Subject, prompts: Sequence[Prompt]) -> Check | None:
    """The finding that what the policy says earns more than any gold answer, once it is said many times."""
    task = subject.task
    if unknown(task):
        return None
    most = max((s.value for s in (task.reward(p, task.gold(p), "stop") for p in prompts) if s.value is not None), default=1.0)
    said = [(group.prompt, c.text) for group in subject.groups for c in group.completions[:2] if c.text.strip()][:12]
    for prompt, text in said:
        try:
            once, often = (task.reward(prompt, t, "stop").value for t in (text, "\n".join([text.rstrip("\n")] * REPEATED)))
        except Exception as error:
            return raised("cheats", error, "a completion that was repeated")
        if often is not None and often > max(most, once or 0.0):
            says = f"a completion earns {once or 0.0:.3g} once, and {often:.3g} said {REPEATED} times; gold earns {most:.3g}"
            return Check("cheats", says, (Finding(fault("K487"), says, often, most, evidence={"text": text[:200]}),))
    return None


def junk(subject: Subject) -> Check:
    """Texts that no parser expects: a finite verdict for each, or "unscorable", and no exception."""
    task = subject.task
    if (why := costly(task)) is not None:
        return Check("junk", "", skipped=why)
    begun, bad, prompt = time.perf_counter(), [], task.train[0]
    for text in JUNK:
        if time.perf_counter() - begun > BUDGET_S:
            break
        try:
            score = task.reward(prompt, text, "stop")
        except Exception as error:
            return raised("junk", error, repr(text[:40]))
        if score.value is not None and not math.isfinite(score.value):
            bad.append(text)
    if bad:
        says = f"{bad[0][:40]!r} is graded a number that is not finite"
        return Check("junk", says, (Finding(fault("K464"), says, float(len(bad)), 0.0),))
    return Check("junk", f"{len(JUNK)} texts that no parser expects have finite verdicts")


def accuracy_words(told: Accuracy) -> str:
    """For the card."""
    low = chance.at_least_bound(told.right, told.gold, 0.05)
    high = chance.at_most_bound(told.wrong, told.cross, 0.05) if told.cross else 0.0
    return (
        f"takes {told.right}/{told.gold} right ones (at least {low:.0%}), {told.wrong}/{told.cross} wrong ones (at most {high:.0%})"
    )


def differ(a: Sequence[Score], b: Sequence[Score]) -> int:
    """How many verdicts are not the same."""
    return sum((x.value, x.correct) != (y.value, y.correct) and not (_nan(x) and _nan(y)) for x, y in zip(a, b, strict=True))


def _nan(score: Score) -> bool:
    return score.value is not None and math.isnan(score.value)


def raised(name: str, error: Exception, on: str) -> Check:
    """The finding that the reward raised."""
    says = f"the reward raises {type(error).__name__} on {on}: {str(error)[:100]}"
    return Check(name, says, (Finding(fault("K489"), says, 1.0, 0.0),))


def unknown(task: Task) -> str | None:
    """Why no text of this task is known to be right; None where one is."""
    return (
        "no completion of this task is known to be right, or to grade one costs money" if getattr(task, "checked", 1) == 0 else None
    )


def costly(task: Task) -> str | None:
    """Why a grader is not asked for the sake of looking; None where it may be."""
    return "its grader asks a server, which costs" if spent(getattr(task, "grade", None)) else None


def _gold_or(task: Task, prompt: Prompt) -> str:
    return prompt.answer if unknown(task) else task.gold(prompt)


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """As many of them as that, evenly over all."""
    return [prompts[i * len(prompts) // most] for i in range(most)] if len(prompts) > most else list(prompts)
