"""The data themselves, and what the policy's samples say of them: copies, leaks, contradictions, wrong gold answers."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from keel.data.items import Item, Items
from keel.data.near import normalised
from keel.data.samples import Sampled
from keel.data.votes import LEAST, Suspect, Suspicion, Vote, suspects, vote
from keel.doctor import chance
from keel.doctor.catalogue import fault
from keel.doctor.finding import Check, Finding
from keel.doctor.subject import STEP, Subject
from keel.tasks.task import PromptTask, reward_many
from keel.types import Completion, Prompt, Score, row_of

ASKED, TRIES = 64, 8  # training prompts that are answered, and how often
MANY, MANY_TRIES, ALSO = 256, 16, 0.5  # the same where votes speak for wrong ones at all: by less than this chance
MORE = 4  # times as many tries where nobody, or everybody, is right
LIVE = 0.1  # of the groups must be live, or most of the work is for nothing: 1 − p^G − (1−p)^G at the edge of chance
WORTH = 4  # times as many live groups at temperature 1, before the temperature is to blame
READ_WORDS = 2_000  # rows in which the answer is looked for
READ = 50_000  # rows that are compared with each other


def copies(subject: Subject) -> Check:
    """Questions that stand there twice, that are held out too, or that have two answers."""
    train, test = subject.task.train[:READ], subject.task.test[:READ]
    by_text: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in train:
        by_text[normalised(prompt.text)].append(prompt)
    held = {normalised(prompt.text) for prompt in test}
    leaked = sum(len(rows) for text, rows in by_text.items() if text in held)
    torn = sum(len({normalised(p.answer) for p in rows}) > 1 for rows in by_text.values())
    per_batch = subject.config.train.prompts_per_step * (subject.trainer.updates_per_batch or 1)
    pairs = sum(math.comb(len(rows), 2) for rows in by_text.values())
    due = math.comb(per_batch, 2) * pairs / max(1, math.comb(len(train), 2))
    findings = []
    if torn and getattr(subject.task, "own_gold_only", True):
        says = f"{torn} questions stand there with several gold answers"
        findings.append(Finding(fault("K363"), says, float(torn), 0.0))
    if leaked:
        says = f"{leaked} training rows ask what is held out for evaluation"
        findings.append(Finding(fault("K364"), says, float(leaked), 0.0))
    if not leaked and (holds := _holds_its_answer(train, test)) is not None:
        findings.append(holds)
    if due >= 1.0 and not torn:
        says = f"{len(train)} rows are {len(by_text)} questions: a batch of {per_batch} prompts holds {due:.1f} pairs of copies"
        findings.append(Finding(fault("K365"), says, due, 1.0))
    subject.facts |= {"distinct": len(by_text), "rows": len(train), "leaked": leaked}
    says = f"{len(train)} rows are {len(by_text)} questions, none of them held out; a batch holds {due:.2f} pairs of copies"
    return Check("copies", findings[0].says if findings else says, tuple(findings))


def _holds_its_answer(train: Sequence[Prompt], test: Sequence[Prompt]) -> Finding | None:
    """The finding that most training questions hold their answer as a word, and held-out ones do so less often."""
    hits, floor = (sum(_word(p.answer, p.text) for p in part[:READ_WORDS]) for part in (train, test))
    tries, tries_floor = (len(part[:READ_WORDS]) for part in (train, test))
    if not tries_floor or hits <= tries / 2 or (p := chance.more_of_two(hits, tries, floor, tries_floor)) >= chance.ALPHA:
        return None
    says = f"{hits / tries:.0%} of training questions hold their own answer, and {floor / tries_floor:.0%} of those held out"
    return Finding(fault("K369"), says, hits / tries, floor / tries_floor, p)


def _word(answer: str, text: str) -> bool:
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


@dataclass(frozen=True)
class Answered:
    """Training prompts with completions of the base, graded as in training."""

    prompts: tuple[Prompt, ...]
    completions: tuple[tuple[Completion, ...], ...]
    scores: tuple[tuple[Score, ...], ...]

    @property
    def right(self) -> list[int]:
        return [sum(s.scorable and s.correct for s in row) for row in self.scores]

    @property
    def tries(self) -> int:
        return len(self.scores[0])

    @property
    def truncated(self) -> float:
        every = [c.finish == "length" for row in self.completions for c in row]
        return sum(every) / len(every)

    @property
    def finished(self) -> list[int]:
        """Lengths in tokens of the completions that ended by themselves."""
        return sorted(len(c.token_ids) for row in self.completions for c in row if c.finish == "stop")


def answered(subject: Subject, tries: int = TRIES, asked: int = ASKED, part: str = "train") -> Answered:
    """What the policy answers now to prompts of one part of the task; made once. A large one is asked a third of that."""
    asked = asked // 3 if subject.large else asked
    key = f"answered {asked} × {tries} of {part}"
    if key not in subject.facts:
        subject.awake()
        rows = getattr(subject.task, part)
        some = [rows[i * len(rows) // asked] for i in range(asked)] if len(rows) > asked else list(rows)
        prompts = subject.rendered(some)
        begun = time.perf_counter()
        made = subject.generate(prompts, tries, step=STEP + 3)
        subject.facts["sampling s/token"] = (time.perf_counter() - begun) / sum(len(c.token_ids) for c in made)
        scores = _scores(subject, [(p, c) for p, row in zip(prompts, _rows(made, tries), strict=True) for c in row])
        subject.facts[key] = Answered(
            tuple(prompts), _rows(made, tries), tuple(scores[i : i + tries] for i in range(0, len(scores), tries))
        )
    return subject.facts[key]


def _scores(subject: Subject, rows: list[tuple[Prompt, Completion]]) -> tuple[Score, ...]:
    try:
        return tuple(reward_many(subject.task, [(p, c.text, c.finish) for p, c in rows]))
    except Exception as error:  # the reward's own probes tell it
        return tuple(Score(None, reason=f"the reward raised {type(error).__name__}") for _ in rows)


def _rows(made: list[Completion], size: int) -> tuple[tuple[Completion, ...], ...]:
    return tuple(tuple(made[i : i + size]) for i in range(0, len(made), size))


def golds(subject: Subject) -> Check:
    """Gold answers that a stable majority of the policy's own samples contradicts, weighed against how often majorities err.

    The model of `keel.data.votes`, fitted to these very samples, says how likely each gold is wrong; the sum of the chances is the
    expected number of wrong ones.
    """
    task = subject.task
    if getattr(task, "checked", 1) == 0:
        return Check("golds", "", skipped="no completion of this task is known to be right")
    if (check := _of_neighbours(subject, answered(subject))) is not None:
        return check
    told = _voted(subject, answered(subject))
    if told is not None and told.p < ALSO and not subject.large:  # new and more samples decide
        told = _voted(subject, answered(subject, MANY_TRIES, MANY))
    if told is None:
        return Check("golds", "", skipped="too few samples have an answer to vote with")
    subject.facts["suspects"] = told.found
    says = f"{told.due:.1f} of {told.able} gold answers are likely wrong"
    if told.due < 1.0 or told.p >= chance.ALPHA:
        return _of_held_out(subject, f"{says}, by the votes of {told.tries} samples each")
    says = f"{says}: most samples agree on another (by chance: {told.p:.1g})"
    evidence = {"rows": [s.id for s in told.found[:10]], "wrong": told.wrong}
    return Check("golds", says, (Finding(fault("K366"), says, told.due, 1.0, told.p, evidence),))


def _of_held_out(subject: Subject, says: str) -> Check:
    """Whether most samples agree on another answer than gold more often on held-out prompts than on training prompts."""
    held, train = (_voted(subject, answered(subject, part=part)) for part in ("test", "train"))
    if held is None or train is None:
        return Check("golds", says)
    told = f"{held.against} of {held.able} held-out prompts, and on {train.against} of {train.able} to train on"
    p = chance.more_of_two(held.against, held.able, train.against, train.able)
    if p >= chance.ALPHA:
        return Check("golds", f"{says}; they agree on another answer on {told}")
    says = f"most samples agree on another answer than gold on {told} (by chance: {p:.1g})"
    return Check("golds", says, (Finding(fault("K370"), says, held.against / held.able, train.against / train.able, p),))


@dataclass(frozen=True)
class Voted:
    """What the votes of samples say of gold answers.

    Args:
        found: the suspicious ones.
        able: rows with enough votes.
        tries: samples of each.
        against: those on which most samples agree on another answer.
        wrong: share of wrong gold answers that the model estimates.
        p: chance of such votes, if no gold answer were wrong.
    """

    found: list[Suspect]
    able: int
    tries: int
    against: int
    wrong: float
    p: float

    @property
    def due(self) -> float:
        """Expected number of wrong ones among the suspicious."""
        return sum(s.probability for s in self.found)


def _voted(subject: Subject, told: Answered) -> Voted | None:
    task = subject.task
    rows = tuple(Item(prompt, "train", {}) for prompt in told.prompts)
    plain = PromptTask(task.name, task.train, task.test, lambda prompt, text: task.reward(prompt, text, "stop"), task.gold)
    items = Items(task.name, rows, {}, {}, plain)
    read = items.reader
    votes = [
        vote(items, prompt, [Sampled(c.text, c.finish) for c in row], read)
        for prompt, row in zip(told.prompts, told.completions, strict=True)
    ]
    able = [v for v in votes if v.tries >= LEAST and v.right + v.rival_count > 0]
    if len(able) < 16:
        return None
    found, model = suspects(able, {p.id: p.answer for p in told.prompts})
    against = sum(2 * v.rival_count > v.tries for v in able)
    return Voted(found, len(able), told.tries, against, model.wrong, _chance_without(able, model))


def _of_neighbours(subject: Subject, told: Answered) -> Check | None:
    """The finding that rows have the gold answer of the row before or after: where a row's own does not suit most of its samples,
    that one does, and that of a row further off, which is the floor, does not.
    """
    train = subject.task.train
    if len(train) < 4 * len(told.prompts):
        return None
    place = {row_of(prompt.id): i for i, prompt in enumerate(train)}
    lost = [
        (place[row_of(prompt.id)], row)
        for prompt, row, right in zip(told.prompts, told.completions, told.right, strict=True)
        if right <= told.tries / 2
    ]
    hits = {by: sum(_suits(subject, train[(i + by) % len(train)], row) for i, row in lost) for by in (-1, 1, 7)}
    by = max((-1, 1), key=hits.__getitem__)
    p = min(1.0, 2 * chance.more_of_two(hits[by], len(lost), hits[7], len(lost))) if lost else 1.0
    if p >= chance.ALPHA:
        return None
    side = "after" if by > 0 else "before"
    says = f"the gold answer of the row {side} suits most samples of {hits[by]} of {len(lost)} rows whose own does not; that of a "
    says += f"row further off suits {hits[7]}"
    return Check("golds", says, (Finding(fault("K368"), says, hits[by] / len(lost), hits[7] / len(lost), p),))


def _suits(subject: Subject, other: Prompt, completions: Sequence[Completion]) -> bool:
    """Whether most of these completions are right by another row's gold answer."""
    scores = _scores(subject, [(other, c) for c in completions])
    return sum(s.scorable and s.correct for s in scores) > len(completions) / 2


def _chance_without(votes: list[Vote], model: Suspicion) -> float:
    """Chance of a likelihood ratio as large as that of these votes, if no gold answer were wrong.

    The model's likelihood with its share of wrong golds against the best one without; twice the logarithm is, without wrong ones,
    0 or χ² with one degree of freedom, half the time each (the share stands at its edge).

    Source: S. G. Self and K.-Y. Liang, JASA 82 (1987), case 5. Differs from it: both fits have the model's weak priors.
    """
    from scipy.optimize import minimize

    counts = Counter((v.tries, v.right, v.rival_count) for v in votes)

    def likelihood(guess: Suspicion) -> float:
        total = 0.0
        for tries in {key[0] for key in counts}:
            good, bad = guess.likelihoods(tries)
            for (n, right, rival), times in counts.items():
                if n == tries:
                    chance_of = (1 - guess.wrong) * good[right, rival] + guess.wrong * bad[right, rival]
                    total += times * math.log(max(chance_of, 1e-300))
        return total - sum(math.log(x) ** 2 for x in (*guess.solve, *guess.rival)) / 4

    def without(x: Iterable[float]) -> Suspicion:
        a, b, c, d = (math.exp(min(6.0, max(-4.0, value))) for value in x)
        return Suspicion(0.0, (a, b), (c, d), model.seen)

    start = [math.log(x) for x in (*model.solve, *model.rival)]
    best = minimize(lambda x: -likelihood(without(x)), start, method="Nelder-Mead", options={"maxiter": 300})
    ratio = max(0.0, 2 * (likelihood(model) + float(best.fun)))
    return 0.5 * chance.normal_tail(math.sqrt(ratio))


def difficulty(subject: Subject) -> Check:
    """How many groups will have right and wrong answers, from the base's own pass rates."""
    size = subject.config.train.group_size
    for tries, asked in ((TRIES, ASKED), (TRIES * MORE, ASKED), (TRIES * MORE, MANY)):  # more where it is not decided
        told = answered(subject, tries, asked)
        share = sum(chance.live_share_of(r, tries, size) for r in told.right) / len(told.right)
        every, total = tries * len(told.right), sum(told.right)
        most = chance.live_share(min(0.5, chance.at_most_bound(min(total, every - total), every)), size)
        if share >= LIVE or (most < LIVE and tries > TRIES) or (subject.large and tries > TRIES):
            break
    mean = total / every
    subject.facts |= {"pass": mean, "live": share}
    says = f"the base answers {mean:.1%} of {every} tries right; {share:.0%} of groups of {size} will have right and wrong answers"
    if most >= LIVE:
        return Check("difficulty", says)
    code, what = ("K568", "too hard") if mean < 0.5 else ("K569", "too easy")
    says = f"{says}, and at the edge of chance {most:.0%}: {what} for this base and group size"
    return Check("difficulty", says, (Finding(fault(code), says, share, LIVE, chance.CARD_ALPHA),))


def choice(subject: Subject) -> Check:
    """At another temperature than 1: live groups, against those of the same prompts at 1."""
    temperature = subject.sampling.temperature
    if temperature == 1.0:
        return Check("choice", f"samples are drawn at temperature {temperature:g}")
    told = answered(subject)
    made = subject.generate(told.prompts, told.tries, replace(subject.sampling, temperature=1.0), step=STEP + 6)
    scores = _scores(subject, [(p, c) for p, row in zip(told.prompts, _rows(made, told.tries), strict=True) for c in row])
    warm = [sum(s.scorable and s.correct for s in scores[i : i + told.tries]) for i in range(0, len(scores), told.tries)]
    live, live_warm = (sum(0 < r < told.tries for r in right) for right in (told.right, warm))
    says = f"{live} of {len(warm)} groups of {told.tries} are live at temperature {temperature:g}, and {live_warm} at 1"
    p = chance.more_of_two(live_warm, len(warm), live, len(warm))
    if p >= chance.ALPHA or WORTH * live >= live_warm:
        return Check("choice", says)
    return Check("choice", says, (Finding(fault("K655"), says, live / len(warm), live_warm / len(warm), p),))


def budget(subject: Subject) -> Check:
    """What the same draws come to with more room: how many right answers the cap cuts off."""
    told = answered(subject)
    says = f"{told.truncated:.1%} of {sum(map(len, told.scores))} completions reach the cap of {subject.cap} tokens"
    if told.truncated == 0.0:
        return Check("budget", says)
    longest = max(len(p.token_ids) for p in told.prompts)
    room = min(subject.policy.context - longest, 8 * subject.cap, subject.cap + 512)
    if room < 2 * subject.cap and room < subject.cap + 16:
        return Check("budget", f"{says}; the model's context has no more room")
    subject.awake()
    cut = [(p, [c.finish == "length" for c in row]) for p, row in zip(told.prompts, told.completions, strict=True)]
    prompts = [p for p, flags in cut if any(flags)][:32]
    wide = replace(subject.sampling, max_completion_tokens=room)
    made = subject.generate(prompts, told.tries, wide, step=STEP + 3)
    by_prompt = {p.id: row for p, row in zip(prompts, _rows(made, told.tries), strict=True)}
    lost = [(p, c) for p, flags in cut if p.id in by_prompt for c, was in zip(by_prompt[p.id], flags, strict=True) if was]
    scores = _scores(subject, lost)
    gained = sum(s.scorable and s.correct for s in scores)
    ended = sum(c.finish == "stop" for _, c in lost)
    kept = sum(told.right)
    share = gained / max(1, gained + kept)
    low = chance.at_least_bound(gained, gained + kept) if gained + kept else 0.0
    says = f"{says}; with {room} tokens {ended} of {len(lost)} of them end, {gained} rightly ({share:.0%} of all right ones)"
    subject.facts["cut"] = share
    if low <= 0.02:
        return Check("budget", says)
    return Check("budget", says, (Finding(fault("K620"), says, share, 0.02, chance.CARD_ALPHA),))
