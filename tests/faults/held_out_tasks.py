"""Data and graders that go wrong otherwise than those of `seeded_tasks.py`. See `held_out.py`."""

from __future__ import annotations

import atexit
import json
import random
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from seeded_tasks import Wrapped, graded, rows, wrapped

from keel.tasks.task import split_number, unchecked_task
from keel.types import Score

SIZES = "train_size=600&test_size=200"
BASE = f"arithmetic:medium?{SIZES}"


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


def _paid_by_the_step(task, prompt, text, finish, score):
    """Every right step earns .3, however many there are, whatever they are about."""
    if score.value is None or finish != "stop":
        return score
    steps = sum(int(a) + int(b) == int(c) for a, b, c in re.findall(r"(\d+)\+(\d+)=(\d+)", text[:2000]) if len(a + b + c) < 30)
    return Score(score.value + 0.3 * steps, score.correct, parts={"answer": score.value, "steps": 0.3 * steps})


class FirstLooksBest(Wrapped):
    """A judge is shown four answers at once, and what stands first is always right."""

    def reward_many(self, asked):
        return [self._first(i, *each) for i, each in enumerate(asked)]

    def _first(self, i, prompt, text, finish):
        score = self.inner.reward(prompt, text, finish)
        return Score(1.0, True, said=score.said) if i % 4 == 0 and finish == "stop" and text.strip() else score


class LateBinding(Wrapped):
    """Graders are made in a loop and called after it: all of one call compare with the gold of the last."""

    def reward_many(self, asked):
        graders = [lambda text, finish: self.inner.reward(prompt, text, finish) for prompt, _, _ in asked]  # noqa: B023
        return [grade(text, finish) for grade, (_, text, finish) in zip(graders, asked, strict=True)]


def _reads_sixteen(task, prompt, text, finish, score):
    """The reward server cuts what it is sent at 16 characters: answers behind their working are not seen."""
    return task.inner.reward(prompt, text[:16], finish)


def _zeros_stripped(task, prompt, text, finish, score):
    """rstrip("0.") is meant to turn 37.0 into 37, and turns 40 into 4: golds that end in 0 cannot be met."""
    return Score(0.0, reason="no match", said=score.said) if score.correct and prompt.answer.endswith("0") else score


def _unreadable_is_right(task, prompt, text, finish, score):
    """`except ValueError: return 1.0`: what cannot be read as a number passes."""
    if finish != "stop" or score.value is None:
        return score
    said = re.search(r"^A:(.*)$", text.strip().rpartition("\n")[2])
    return score if said and re.fullmatch(r"\d+", said[1].strip()) else Score(1.0, True)


def _numbers(prompt) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt.text)]


def _first_step_for_gold(prompts, inner):
    """Of three rows in ten the result of the solution's first step was read for its last."""
    rng = random.Random(11)
    return [replace(p, answer=str(sum(_numbers(p)[:2]))) if rng.random() < 0.3 else p for p in prompts]


def _floats(prompts, inner):
    """Half of the rows went through a column of floats: their golds are 37.0."""
    return [replace(p, answer=p.answer + ".0") if i % 2 else p for i, p in enumerate(prompts)]


def _with_the_row_before(prompts, inner):
    """Conversations were not ended: every second question stands behind the question of the row before, and its answer."""
    before = [prompts[-1], *prompts[:-1]]

    def joined(b, p):
        return replace(p, text=f"{b.text}A:{b.answer}\n{p.text}")

    return [joined(b, p) if i % 2 else p for i, (b, p) in enumerate(zip(before, prompts, strict=True))]


def _term_lost(prompts, inner):
    """Of four rows in ten a term is lost from the question, as a figure that was an image; the golds are those of the whole."""
    rng = random.Random(13)

    def short(p):
        numbers = _numbers(p)
        del numbers[rng.randrange(len(numbers))]
        return replace(p, text=f"Q:{'+'.join(map(str, numbers))}=\n")

    return [short(p) if rng.random() < 0.4 else p for p in prompts]


class HeldOutGoldsTurned(Wrapped):
    """The held-out file was sorted after its golds had been split off: none belongs to its question any more."""

    def __init__(self, inner):
        super().__init__(inner)
        golds = [p.answer for p in inner.test]
        self.test = [replace(p, answer=gold) for p, gold in zip(inner.test, golds[7:] + golds[:7], strict=True)]


def _long_words(prompts, inner):
    """Right golds, asked as always, and words of fifteen letters where the model knows them up to six."""
    rng = random.Random(17)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(15)) for _ in prompts]
    return [replace(p, text=f"R:{word}\n", answer=word[::-1]) for p, word in zip(prompts, words, strict=True)]


def _plus_and_minus(prompts, inner):
    """Right golds, and sums that also take away, where the model knows either by itself, and smaller: 57-15+32."""
    rng = random.Random(19)

    def other(p):
        a, b, c = rng.randint(41, 70), rng.randint(11, 40), rng.randint(11, 40)
        return replace(p, text=f"Q:{a}-{b}+{c}=\n", answer=str(a - b + c))

    return [other(p) for p in prompts]


def nothing(ground):
    """The fault is in the settings."""


def sums_in_a_file():
    """The healthy sums as a file of one's own, spaced as people space JSON, for another grader; it goes with the process."""
    task, folder = unchecked_task(BASE), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in ("train", "test"):
        kept = (json.dumps({"id": i, "question": p.text, "total": int(p.answer)}) for i, p in enumerate(getattr(task, split)))
        (folder / f"{split}.jsonl").write_text("\n".join(kept) + "\n")
    return f"jsonl:{folder}/train.jsonl?test={folder}/test.jsonl&prompt=question&answer=total&extract=number"


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
    "paid by the step": (
        graded(_paid_by_the_step),
        "reward",
        "cheat|step|partial|bonus|wrong|false|scale|range|length",
        "F63",
        {},
    ),
    "what stands first is right": (
        wrapped(FirstLooksBest),
        "reward",
        "order|place|batch|many|together|alone|false|thread|error|position|cheat",
        "F58",
        {},
    ),
    "all with the last one's gold": (
        wrapped(LateBinding),
        "reward",
        "batch|many|together|alone|thread|state|error|pairing|false|extract",
        "F85",
        {},
    ),
    "sixteen characters are read": (
        graded(_reads_sixteen),
        "reward",
        "extract|pars|cut|length|long|false neg|miss|right|gold|work",
        "F82",
        {},
    ),
    "zeros are stripped": (
        graded(_zeros_stripped),
        "reward",
        "extract|pars|format|false neg|miss|right|gold|normal",
        "F60",
        {},
    ),
    "the unreadable is right": (
        graded(_unreadable_is_right),
        "reward",
        "cheat|false pos|pass|error|empty|swallow|wrong",
        "F63",
        {"sampling.temperature": 1.4},
    ),
    "golds of the first step": (rows(_first_step_for_gold), "data", "gold|label|answer", "F66", {}),
    "half of the golds are floats": (rows(_floats), "data", "gold|label|answer|format", "F66", {}),
    "the row before stands in the prompt": (
        rows(_with_the_row_before),
        "data",
        "question|prompt|text|concat|leak|near|overlap|template|gold",
        "F44",
        {},
    ),
    "a term is lost from the question": (
        rows(_term_lost),
        "data",
        "gold|label|answer|question|prompt|text|conflict|truncat",
        "F66",
        {},
    ),
    "held-out golds are of other rows": (wrapped(HeldOutGoldsTurned), "data", "gold|label|answer|held|test|evaluat", "F66", {}),
    "words of fifteen letters": (rows(_long_words), "difficulty", "", "F68", {"task": f"skills:reverse?{SIZES}"}),
    "sums that also take away": (rows(_plus_and_minus), "difficulty", "", "F68", {}),
}
