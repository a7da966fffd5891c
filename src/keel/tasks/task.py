"""What a task is, how one is found by name, and what every one must prove when it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qsl

from keel.errors import KeelError, nearest
from keel.rewards.compose import grade_many
from keel.types import Finish, Prompt, Score

HELD_OUT = 8  # one problem of this many is kept for the test split
CHECKED = 20_000  # rows that are graded on load; of a larger task, evenly spread ones


@runtime_checkable
class Task(Protocol):
    """Prompts, and the reward that grades their completions.

    `train` and `test` are in a fixed order, their ids are unique, and no prompt stands in both.
    """

    name: str
    train: Sequence[Prompt]
    test: Sequence[Prompt]

    def reward(self, prompt: Prompt, text: str, finish: Finish) -> Score:
        """The verdict on one completion: a finite value, or unscorable with the reason. Never raises on any text."""
        ...

    def gold(self, prompt: Prompt) -> str:
        """A completion that deserves a score of 1."""
        ...

    def check(self) -> None:
        """Raises KeelError where the data or the reward cannot be right (see `check_task`)."""
        ...


@dataclass(frozen=True)
class PromptTask:
    """A task whose data are two lists of prompts and whose reward is one function.

    Args:
        name: as the user would ask for it.
        train, test: prompts to train on, and held-out ones.
        grade: (prompt, completion text) → Score. Truncated completions never reach it: they earn nothing.
        write_gold: prompt → a completion that is right; the gold answer itself unless given.
        own_gold_only: whether one row's gold may never be right for another row with another answer. False where
            several answers can be right, or the grader gives part of a point: then it may be so for half of them.
        checked: rows that are graded on load. 0 where no completion is known to be right, or grading costs money.
    """

    name: str
    train: Sequence[Prompt]
    test: Sequence[Prompt]
    grade: Callable[[Prompt, str], Score]
    write_gold: Callable[[Prompt], str] = lambda prompt: prompt.answer
    own_gold_only: bool = True
    checked: int = CHECKED

    def reward(self, prompt: Prompt, text: str, finish: Finish = "stop") -> Score:
        """0 for a truncated or an empty completion, unscorable for a failed one, else what `grade` says."""
        ungraded = _ungraded(text, finish)
        return self.grade(prompt, text) if ungraded is None else ungraded

    def reward_many(self, asked: Sequence[tuple[Prompt, str, Finish]]) -> list[Score]:
        """`reward` of each, in their order; by the grader's `many` where it has one."""
        if type(self).reward is not PromptTask.reward:  # a subclass has a reward of its own
            return [self.reward(prompt, text, finish) for prompt, text, finish in asked]
        ungraded = [_ungraded(text, finish) for _, text, finish in asked]
        graded = iter(
            grade_many(self.grade, [(p, text) for (p, text, _), known in zip(asked, ungraded, strict=True) if known is None])
        )
        return [next(graded) if known is None else known for known in ungraded]

    def gold(self, prompt: Prompt) -> str:
        return self.write_gold(prompt)

    def check(self) -> None:
        check_task(self, self.own_gold_only, self.checked)


def _ungraded(text: object, finish: Finish) -> Score | None:
    """The verdict on what no grader has to see; None on all else."""
    if finish == "error":
        return Score(None, reason="the engine failed on this completion")
    if finish == "length":
        return Score(0.0, reason="truncated")
    return None if isinstance(text, str) and text.strip() else Score(0.0, reason="empty")


def reward_many(task: Task, asked: Sequence[tuple[Prompt, str, Finish]]) -> list[Score]:
    """The rewards of many completions, in their order: by the task's own `reward_many`, which a task may have so that a slow grader
    is asked many things at once; else one by one.
    """
    many = getattr(task, "reward_many", None)
    return many(asked) if many is not None else [task.reward(prompt, text, finish) for prompt, text, finish in asked]


# ---- finding one -----------------------------------------------------------------------------------------------------

Factory = Callable[..., Task]
_HOMES = {
    "arithmetic": "keel.tasks.arithmetic:arithmetic",
    "sums": "keel.tasks.arithmetic:sums",
    "skills": "keel.tasks.skills:skills",
    "reasoning_gym": "keel.tasks.reasoning_gym:reasoning_gym",
    "jsonl": "keel.tasks.table:jsonl",
    "parquet": "keel.tasks.table:parquet",
    "datasets": "keel.tasks.table:datasets",
    "noisy": "keel.tasks.noisy:noisy",
    "verifiers": "keel.integrations.verifiers:verifiers",
}
_REGISTERED: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> Factory:
    """Make `get_task("NAME:VARIANT?option=value")` call factory("VARIANT", option="value").

    Raises:
        KeelError: the name is taken by another factory.
    """
    taken = name in _HOMES or _REGISTERED.get(name, factory) is not factory
    if taken or not name.isidentifier():
        why = "is taken" if taken else "is no identifier (letters, digits and underscores)"
        raise KeelError(f"Task {name!r} cannot be registered: the name {why}. Choose another one.")
    _REGISTERED[name] = factory
    return factory


def known_tasks() -> list[str]:
    """Names that can stand before the colon of a task's spec."""
    return sorted({*_HOMES, *_REGISTERED})


def capped(spec: str) -> tuple[str, int | None]:
    """A task's spec without the cap that may stand behind it, and that cap in tokens: "arithmetic:medium@56"."""
    task, _, cap = spec.rpartition("@")
    return (task, int(cap)) if task and cap.isdecimal() and int(cap) > 0 else (spec, None)


def get_task(spec: str, **options: Any) -> Task:
    """A task by its spec, checked.

    Args:
        spec: "name", "name:variant" or "name:variant?option=value&option=value", for instance "arithmetic:medium",
            "reasoning_gym:basic_arithmetic" or "jsonl:rows.jsonl?prompt=question&answer=gold".
        options: more options; they win over those in the spec.

    Raises:
        KeelError: no such task or variant, an option that it does not take, or data that fail `check_task`.
    """
    task = unchecked_task(spec, **options)
    task.check()
    return task


def unchecked_task(spec: str, **options: Any) -> Task:
    """The same without its check: for looking at data that may be bad.

    Every task takes the option `skip_test`: so many held-out prompts are left out from the front, so that one half can choose a
    checkpoint and the other judge it.

    Raises:
        KeelError: no such task or variant, an option that it does not take, or data that cannot be read.
    """
    head, _, query = spec.partition("?")
    name, _, variant = head.partition(":")
    if name not in _HOMES and name not in _REGISTERED:
        raise KeelError(
            f"Unknown task {name!r}: {nearest(name, known_tasks())}Expected one of {', '.join(known_tasks())}. A task of "
            f"your own: `keel.tasks.task.register(name, factory)` in a module that `plugins` names."
        )
    factory = _REGISTERED[name] if name in _REGISTERED else _import(_HOMES[name])
    chosen = {**dict(parse_qsl(query, keep_blank_values=True)), **options}
    skipped = chosen.pop("skip_test", 0)
    _check_options(spec, factory, chosen)
    made = factory(variant, **chosen)
    return _without_first(made, skipped) if skipped else made


def _without_first(task: Task, skipped: int | str) -> Task:
    if not isinstance(task, PromptTask) or not str(skipped).isdecimal() or int(skipped) >= len(task.test):
        raise KeelError(
            f"Task {task.name!r} with {len(task.test)} held-out prompts got skip_test={skipped!r}. Expected a number below that, "
            "of a task that is two lists of prompts."
        )
    return replace(task, test=task.test[int(skipped) :])


def _import(home: str) -> Factory:
    module, _, function = home.partition(":")
    return getattr(import_module(module), function)


def _check_options(spec: str, factory: Factory, chosen: Mapping[str, Any]) -> None:
    from inspect import Parameter, signature

    parameters = list(signature(factory).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return
    for key in chosen:
        if key not in names:
            raise KeelError(f"Task {spec!r} takes no option {key!r}: {nearest(key, names)}It takes {', '.join(names) or 'none'}.")


def pick_variant(task: str, variant: str, known: Iterable[str]) -> str:
    """The variant, if it is known.

    Raises:
        KeelError: it is not; names the nearest.
    """
    known = list(known)
    if variant in known:
        return variant
    found = f"has no variant {variant!r}: {nearest(variant, known)}" if variant else "needs a variant: "
    raise KeelError(f"Task {task!r} {found}Expected one of {', '.join(f'{task}:{name}' for name in known)}.")


# ---- splitting and checking ------------------------------------------------------------------------------------------


def held_out(key: str, share: int = HELD_OUT) -> bool:
    """Whether a problem belongs to the test split: one of `share`, by a hash of its key, so that it never depends on
    what else was generated.

    Give problems that are the same but for their order the same key.
    """
    return split_number(key) % share == 0


def split_number(key: str) -> int:
    """A whole number below 2⁶⁴ that stands for the key alone, in every process and version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=b"keel held out").digest()
    return int.from_bytes(digest, "little")


def check_task(task: Task, own_gold_only: bool = True, checked: int = CHECKED) -> None:
    """Gold scores 1, the empty completion 0, another row's gold 0; ids are unique and no training prompt is a test one.

    Raises:
        KeelError: naming the row and what is wrong with it.
    """
    for split, prompts in (("train", task.train), ("test", task.test)):
        if not prompts:
            raise KeelError(f"Task {task.name!r} has no {split} prompts. Expected at least one; give it more data.")
    _check_ids(task)
    rows = _spread([*task.train, *task.test], checked)
    for prompt in rows:
        _check_gold(task, prompt)
        _expect(task, prompt, "", "the empty completion")
    _check_others(task, rows, own_gold_only)


def _spread(prompts: Sequence[Prompt], most: int) -> Sequence[Prompt]:
    return prompts if len(prompts) <= most else [prompts[i * len(prompts) // most] for i in range(most)]


def _check_ids(task: Task) -> None:
    seen: set[str] = set()
    for prompt in [*task.train, *task.test]:
        if prompt.id in seen:
            raise KeelError(
                f"Task {task.name!r} has two prompts with the id {prompt.id!r}. Groups are formed by id, so every "
                f"prompt needs its own."
            )
        seen.add(prompt.id)
    shared = {prompt.text for prompt in task.train} & {prompt.text for prompt in task.test}
    if shared:
        raise KeelError(
            f"Task {task.name!r} trains on {len(shared)} of its own test prompts, such as {_short(min(shared))}. "
            f"Expected none: evaluation would measure memory. Split the data by the text of the prompt."
        )


def _check_gold(task: Task, prompt: Prompt) -> None:
    gold = task.gold(prompt)
    score = task.reward(prompt, gold, "stop")
    if score.value is None or abs(score.value - 1.0) > 1e-9 or not score.correct:
        said = f"unscorable ({score.reason})" if score.value is None else f"{score.value:g}"
        raise KeelError(
            f"Task {task.name!r}: the gold answer of prompt {prompt.id!r} does not score. {_short(prompt.text)} with "
            f"the gold completion {_short(gold)} (answer {_short(prompt.answer)}) is graded {said}; expected 1. "
            f"Training could never be rewarded here: mend the row, or choose the reward that reads such answers."
        )


def _expect(task: Task, prompt: Prompt, text: str, what: str) -> None:
    score = task.reward(prompt, text, "stop")
    if score.value is None or score.value > 0.0 or score.correct:
        said = f"unscorable ({score.reason})" if score.value is None else f"{score.value:g}"
        raise KeelError(
            f"Task {task.name!r}: {what} is graded {said} on prompt {prompt.id!r}, {_short(prompt.text)}; expected 0. "
            f"A policy would learn to give it: make the reward stricter."
        )


def _check_others(task: Task, rows: Sequence[Prompt], own_gold_only: bool) -> None:
    """Every row graded with the gold of the row halfway round the list, where that one has another answer."""
    half = max(1, len(rows) // 2)
    pairs = [(p, rows[(i + half) % len(rows)]) for i, p in enumerate(rows)]
    pairs = [(prompt, other) for prompt, other in pairs if prompt.answer != other.answer]
    if own_gold_only:
        for prompt, other in pairs:
            _expect(task, prompt, task.gold(other), f"the gold answer of another prompt ({other.id!r})")
        return
    right = sum(task.reward(prompt, task.gold(other), "stop").correct for prompt, other in pairs)
    if right * 2 > len(pairs):
        raise KeelError(
            f"Task {task.name!r}: {right} of {len(pairs)} prompts accept the gold answer of another prompt. Expected "
            f"few: the reward cannot tell right from wrong; make it stricter."
        )


def _short(text: str, most: int = 80) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")
