"""Data and graders that go wrong otherwise than those of `seeded_tasks.py`. See `held_out.py`."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from seeded_tasks import Wrapped, graded

from keel.tasks.task import split_number, unchecked_task
from keel.types import Score

BASE = "arithmetic:medium?train_size=600&test_size=200"


def share(key: str) -> float:
    """A number in [0, 1) that stands for the key."""
    return split_number(key) / 2.0**64


def said(text: str) -> str:
    return text.rsplit("A:", 1)[-1].strip()


def own(change):
    """A grader of one's own: `change(prompt, text)` → Score, where a completion is complete and says something."""

    def verdict(task, prompt, text, finish, score):
        return change(prompt, text) if finish == "stop" and text.strip() else score

    return graded(verdict)


def verdict(right: bool) -> Score:
    return Score(float(right), bool(right))


def file_with(change):
    """The task's rows written to JSONL files after `change(rows)`, of training and held-out ones, and read from there."""

    def plant(ground):
        task = unchecked_task(BASE)
        rows = {s: [{"prompt": p.text, "answer": p.answer} for p in getattr(task, s)] for s in ("train", "test")}
        folder = Path(tempfile.mkdtemp())
        for split, kept in change(rows).items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        ground.settings["task"] = f"jsonl:{folder}/train.jsonl?test={folder}/test.jsonl&extract=marker"

    return plant


def wrong_golds(fraction):
    def change(rows):
        def row(r):
            wrong = share("gold " + r["prompt"]) < fraction
            return r | {"answer": str(int(r["answer"]) + 1)} if wrong else r

        return {split: [row(r) for r in kept] for split, kept in rows.items()}

    return file_with(change)


def _shifted(rows):
    """Every question has the answer of the next row."""
    return {
        s: [r | {"answer": other["answer"]} for r, other in zip(kept, [*kept[1:], kept[0]], strict=True)]
        for s, kept in rows.items()
    }


def _copies_spaced(rows):
    return rows | {"train": [r | {"prompt": r["prompt"] + " " * n} for r in rows["train"][:60] for n in range(10)]}


def _overlap_spaced(rows):
    return rows | {"train": rows["train"] + [r | {"prompt": " " + r["prompt"]} for r in rows["test"][:100]]}


def _conflicting(rows):
    return rows | {"train": rows["train"] + [r | {"answer": str(int(r["answer"]) + 2)} for r in rows["train"][:60]]}


def _shares_verdicts(key):
    """The first verdict of a key is kept for all that have the same key."""

    def plant(ground):
        class Remembers(Wrapped):
            def __init__(self, inner):
                super().__init__(inner)
                self.kept = {}

            def reward(self, prompt, text, finish="stop"):
                k = key(prompt, text)
                if k not in self.kept:
                    self.kept[k] = self.inner.reward(prompt, text, finish)
                return self.kept[k]

        ground.task(Remembers)

    return plant


def _adds_length(task, prompt, text, finish, score):
    return score if score.value is None else replace(score, value=score.value + 0.01 * len(text))


def _raises_on_long(task, prompt, text, finish, score):
    if len(text) > 60:
        raise ValueError("too long")
    return score


def _slow_on_powers(task, prompt, text, finish, score):
    if "^" in text or "**" in text:
        time.sleep(20)
    return score


def _infinite_sometimes(task, prompt, text, finish, score):
    return replace(score, value=float("inf")) if share("inf " + text) < 0.1 else score


def _misses(fraction):
    def change(task, prompt, text, finish, score):
        missed = score.correct and share("miss " + prompt.id + text) < fraction
        return Score(0.0) if missed else score

    return graded(change)


def _rewards_wrong(fraction):
    def change(task, prompt, text, finish, score):
        lucky = finish == "stop" and text.strip() and not score.correct and share("luck " + prompt.id + text) < fraction
        return Score(1.0, True) if lucky else score

    return graded(change)


def terms(n):
    """Sums of n terms, beyond what the bundled model can do."""

    def change(rows):
        def row(r, i):
            numbers = [1 + int(20 * share(f"{r['prompt']} {i} {k}")) for k in range(n)]
            return {"prompt": f"Q:{'+'.join(map(str, numbers))}=\n", "answer": str(sum(numbers))}

        return {split: [row(r, i) for i, r in enumerate(kept)] for split, kept in rows.items()}

    return file_with(change)


def nothing(ground):
    """The fault is in the settings."""


TASKS = {  # fault: how, part, component, museum, settings
    "grader adds length": (graded(_adds_length), "reward", "cheat|false pos|errors|reversed", "F63", {}),
    "grader takes beginnings": (
        own(lambda p, t: verdict(bool(said(t)) and p.answer.startswith(said(t)))),
        "reward",
        "false pos|cheat",
        "F58",
        {},
    ),
    "grader takes endings": (
        own(lambda p, t: verdict(bool(said(t)) and said(t).endswith(p.answer[-1]))),
        "reward",
        "false pos|cheat",
        "F58",
        {},
    ),
    "grader is one off": (
        own(lambda p, t: verdict(said(t).lstrip("-").isdecimal() and abs(int(said(t)[:9]) - int(p.answer)) <= 1)),
        "reward",
        "false pos|cheat",
        "F58",
        {},
    ),
    "grader takes a list of guesses": (
        own(lambda p, t: verdict(p.answer in t.replace(",", " ").split() or said(t) == p.answer)),
        "reward",
        "false pos|cheat",
        "F63",
        {},
    ),
    "grader misses 15 %": (_misses(0.15), "reward", "extraction|errors", "F82", {}),
    "grader rewards 10 % of wrong ones": (_rewards_wrong(0.1), "reward", "false pos|errors", "F58", {}),
    "grader rewards 25 % of wrong ones": (_rewards_wrong(0.25), "reward", "false pos|errors", "F58", {}),
    "grader raises on long text": (graded(_raises_on_long), "reward", "errors", "F89", {}),
    "grader takes 20 s for powers": (graded(_slow_on_powers), "reward", "time", "F19", {}),
    "grader remembers texts": (_shares_verdicts(lambda p, t: t), "reward", "thread|errors|false", "F85", {}),
    "grader remembers prompts": (_shares_verdicts(lambda p, t: p.id), "reward", "thread|errors|false", "F85", {}),
    "grader says infinity at times": (graded(_infinite_sometimes), "reward", "finite", "F63", {}),
    "a fifth of the golds are wrong": (wrong_golds(0.2), "data", "gold", "F66", {}),
    "one gold in twenty is wrong": (wrong_golds(0.05), "data", "gold", "F66", {}),
    "golds of the next row": (file_with(_shifted), "data", "gold", "F66", {}),
    "copies with other spaces": (file_with(_copies_spaced), "data", "duplicates", "F65", {}),
    "held-out questions with other spaces": (file_with(_overlap_spaced), "data", "overlap", "F65", {}),
    "a tenth of the questions twice, with other golds": (file_with(_conflicting), "data", "conflicting|gold", "F66", {}),
    "sums of nine terms": (terms(9), "difficulty", "base", "F68", {}),
    "a temperature that leaves nothing to learn": (  # at 1, groups of the same questions are live
        nothing,
        "settings",
        "temperature",
        "F68",
        {"task": "skills:reverse", "sampling.temperature": 0.1},
    ),
}
