"""Tasks whose data or grader go wrong: wrappers around a real one. See `seeded.py`."""

from __future__ import annotations

import math
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from keel.types import Prompt, Score


class Wrapped:
    """A task that passes everything on; faults change one method each. Its check on load does nothing."""

    def __init__(self, inner):
        self.inner = inner
        self.name, self.train, self.test = inner.name, inner.train, inner.test

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reward(self, prompt, text, finish="stop"):
        return self.inner.reward(prompt, text, finish)

    def reward_many(self, asked):
        return [self.reward(*each) for each in asked]

    def gold(self, prompt):
        return self.inner.gold(prompt)

    def check(self):
        """Nothing: as a task of one's own may have it."""


def graded(change: Callable[[Wrapped, Prompt, str, str, Score], Score]) -> Callable:
    """Every verdict goes through `change(task, prompt, text, finish, score)`."""

    class Graded(Wrapped):
        def reward(self, prompt, text, finish="stop"):
            return change(self, prompt, text, finish, self.inner.reward(prompt, text, finish))

    return lambda ground: ground.task(Graded)


def rows(change: Callable[[list[Prompt], Any], list[Prompt]]) -> Callable:
    """The training prompts go through `change(prompts, task)`."""

    class Changed(Wrapped):
        def __init__(self, inner):
            super().__init__(inner)
            self.train = change(list(inner.train), inner)

    return lambda ground: ground.task(Changed)


class InThreads(Wrapped):
    """Graded in worker threads, with a timeout by signal whose failure there is swallowed."""

    def reward(self, prompt, text, finish="stop"):
        try:
            old = signal.signal(signal.SIGALRM, lambda *_: None)
        except ValueError:
            return Score(0.0, reason="no match")
        signal.signal(signal.SIGALRM, old)
        return self.inner.reward(prompt, text, finish)

    def reward_many(self, asked):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda each: self.reward(*each), asked))


class SharedState(Wrapped):
    """The last prompt is kept in a field that threads share."""

    def reward(self, prompt, text, finish="stop"):
        self.now = prompt
        time.sleep(0.0005)
        return self.inner.reward(replace(prompt, answer=self.now.answer), text, finish)

    def reward_many(self, asked):
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda each: self.reward(*each), asked))


class Flaky(Wrapped):
    """Three calls in ten fail, and the failure is told as a wrong answer."""

    def __init__(self, inner):
        super().__init__(inner)
        self.random, self.lock = random.Random(0), threading.Lock()

    def reward(self, prompt, text, finish="stop"):
        with self.lock:
            failed = self.random.random() < 0.3
        return Score(0.0, reason="error") if failed else self.inner.reward(prompt, text, finish)


class Hangs(Wrapped):
    """It tries to work out powers."""

    def reward(self, prompt, text, finish="stop"):
        if re.search(r"\d\s*(\^|\*\*)\s*[({]*\d", text):
            time.sleep(20)
        return self.inner.reward(prompt, text, finish)


def _anywhere(task, prompt, text, finish, score):
    """Right as soon as the answer stands anywhere."""
    return Score(1.0, True) if prompt.answer.strip() and prompt.answer.strip() in text else score


def _unfinished_counts(task, prompt, text, finish, score):
    return task.inner.reward(prompt, text, "stop") if finish == "length" else score


def _raises(task, prompt, text, finish, score):
    int(text.split(":")[1].strip()) if ":" in text else text[0]
    return score


def _nan(task, prompt, text, finish, score):
    return Score(float("nan")) if score.correct else score


def _reversed(task, prompt, text, finish, score):
    return Score(1.0 - (score.value or 0.0), not score.correct)


def _half_right(task, prompt, text, finish, score):
    """Whether an answer that is right is taken depends on the text: half of them are not."""
    return Score(0.0, reason="format") if sum(map(ord, prompt.text)) % 2 else score


def _wrong_gold(share: float):
    def change(prompts, inner):
        rng = random.Random(0)
        answers = [p.answer for p in prompts]
        return [replace(p, answer=rng.choice(answers)) if rng.random() < share else p for p in prompts]

    return change


def _copied(prompts, inner):
    few = prompts[:40]
    return [replace(few[i % 40], id=f"{few[i % 40].id}#{i}") for i in range(len(prompts))]


def _leaked(prompts, inner):
    held = [replace(p, id=f"again/{p.id}") for p in inner.test[:200]]
    return prompts[:-200] + held


def _questions_lost(prompts, inner):
    return [replace(p, text=prompts[0].text) for p in prompts]


def _products(prompts, inner):
    """Products in place of sums: asked as the model knows it, and nothing that it ever learned."""

    def product(prompt):
        terms = [int(term) for term in re.findall(r"\d+", prompt.text)]
        return replace(prompt, text=prompt.text.replace("+", "*"), answer=str(math.prod(terms)))

    return [product(p) for p in prompts]


def _ungradable(prompts, inner):
    return [replace(p, answer="see the solution") if i % 5 == 0 else p for i, p in enumerate(prompts)]


def wrapped(kind):
    return lambda ground: ground.task(kind)


def nothing(ground) -> None:
    """The fault is in the settings themselves."""


TASKS = {  # name: (plant, part, a word of the component, museum, settings)
    "grader is always 0": (graded(lambda *_: Score(0.0, reason="no answer found")), "reward", "extract", "F61"),
    "grader is always 1": (graded(lambda *_: Score(1.0, True)), "reward", "cheat", "F63"),
    "grader fails in threads": (wrapped(InThreads), "reward", "thread", "F18"),
    "grader shares state between threads": (wrapped(SharedState), "reward", "thread", "F85"),
    "grader swallows errors": (wrapped(Flaky), "reward", "error", "F62"),
    "grader hangs": (wrapped(Hangs), "reward", "time", "F19"),
    "grader finds the answer anywhere": (graded(_anywhere), "reward", "cheat", "F63"),
    "grader raises": (graded(_raises), "reward", "error", "F89"),
    "grader says NaN": (graded(_nan), "reward", "finite", "F63"),
    "grader rewards the wrong": (graded(_reversed), "reward", "revers", "F04"),
    "grader misses half": (graded(_half_right), "reward", "extract", "F82"),
    "grader tosses a coin": (
        nothing, "reward", "error", "F62", {"task": "noisy:arithmetic:medium?fpr=0.5&fnr=0.5"},
    ),
    "too hard for the base": (rows(_products), "difficulty", "", "F68"),
    "half of the golds are wrong": (rows(_wrong_gold(0.5)), "data", "gold", "F66"),
    "every row stands there 200 times": (rows(_copied), "data", "duplicate", "F65"),
    "held-out questions are trained on": (rows(_leaked), "data", "overlap", "F65"),
    "all questions are the same": (rows(_questions_lost), "data", "conflict", "F66"),
    "a fifth of the golds cannot be graded": (rows(_ungradable), "data", "gold", "F66"),
}  # fmt: skip
